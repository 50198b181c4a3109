"""The capabilities of a checkpoint, for its manifest."""

from __future__ import annotations

from dlm_ray.config.manifest_fields import Capabilities
from dlm_ray.config.objective import rules_of
from dlm_ray.config.recipe import Recipe
from dlm_ray.diffusion.denoiser import Objective
from dlm_ray.diffusion.likelihood import block_tokens_of


def capabilities(recipe: Recipe, objective: Objective, sequence_length: int) -> Capabilities:
    """Return the likelihood kind, infilling, canvas, block size, rules, context length and document mask of a run."""
    is_simplex = objective.canvas == "simplex"
    block_tokens = sequence_length
    if objective.is_causal:
        block_tokens = 1
    elif objective.canvas == "block":
        block_tokens = block_tokens_of(objective)
    is_whole = block_tokens == sequence_length and not is_simplex
    return {
        "likelihood": objective.likelihood,
        "infill": is_whole,
        "canvas": "simplex_blocks" if is_simplex else "whole" if is_whole else "blocks",
        "block_tokens": block_tokens,
        "rules": list(rules_of(objective.kind)),
        "sequence_length": sequence_length,
        "document_mask": recipe.data.document_mask,
    }
