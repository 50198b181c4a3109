"""What can be asked of a checkpoint, as its manifest says it."""

from __future__ import annotations

from typing import Any

from dlm_ray.config.objective import rules_of
from dlm_ray.config.recipe import Recipe
from dlm_ray.training.setup import Network


def capabilities(recipe: Recipe, network: Network, objective: Any, sequence_length: int) -> dict[str, Any]:
    """Likelihood, infilling, canvas, size of blocks, sampling rules, context, and whether documents were kept apart."""
    block_tokens = 1 if network.is_causal else recipe.objective.block_tokens or sequence_length
    is_simplex = objective.likelihood == "none"
    is_whole = block_tokens == sequence_length and not is_simplex
    return {
        "likelihood": objective.likelihood,
        "infill": is_whole,
        "canvas": "simplex_blocks" if is_simplex else "whole" if is_whole else "blocks",
        "block_tokens": block_tokens,
        "rules": list(rules_of(recipe.objective.name)),
        "sequence_length": sequence_length,
        "document_mask": recipe.data.document_mask,
    }
