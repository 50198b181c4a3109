"""What changes with the step, other than the learning rate: the visibility that attention is annealed through, and the size of blocks."""

from __future__ import annotations

import numpy as np
import torch

from dlm_ray.config.recipe import Recipe
from dlm_ray.diffusion.visibility import Visibility, annealed, documents_apart


def annealing_ratio(recipe: Recipe, step: int) -> float:
    """R = min(1, (step + 1) / annealing steps): the visible share of the future (DiffuLLaMA, arXiv 2410.17891, section 3.3)."""
    annealing = recipe.curriculum.annealing
    if annealing.pattern == "none":
        return 1.0
    return min(1.0, (step + 1) / annealing.num_steps(recipe.training.steps))


def block_tokens(recipe: Recipe, step: int | None) -> int | None:
    """K of a step: the stage's, or after all stages (and for `step` None) the objective's; None if it has no blocks."""
    first = 0
    for stage in recipe.curriculum.block_sizes:
        if step is not None and first <= step < first + stage.steps:
            return stage.block_tokens
        first += stage.steps
    return recipe.objective.block_tokens


def visibility(
    recipe: Recipe, is_causal: bool, step: int | None, document_ids: np.ndarray, device: torch.device
) -> Visibility:
    """Who sees whom in one micro-batch, before an objective draws the borders of its blocks.

    Args:
        recipe: says how attention is annealed, and whether documents are kept apart.
        is_causal: of the objective; a causal one stays causal.
        step: the optimizer step; None for the state after all annealing, which validation and evaluation use.
        document_ids: [B, L] on the host, -1 for padding.
        device: where the mask will be needed.
    """
    documents = documents_apart(document_ids, recipe.data.document_mask, device)
    if is_causal:
        return Visibility("causal", document_ids=documents)
    ratio = 1.0 if step is None else annealing_ratio(recipe, step)
    reach = block_tokens(recipe, step) or document_ids.shape[1]  # the future within a block ends with it
    return annealed(recipe.curriculum.annealing.pattern, ratio, step or 0, reach, documents)
