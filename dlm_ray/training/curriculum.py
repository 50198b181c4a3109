"""Schedules over the steps, other than the learning rate: the annealing of attention, and the size of blocks."""

from __future__ import annotations

import numpy as np
import torch

from dlm_ray.config.recipe import Recipe
from dlm_ray.diffusion.visibility import Visibility, annealed, documents_apart


def annealing_ratio(recipe: Recipe, step: int) -> float:
    """Return R = min(1, (step + 1) / annealing steps), the visible share of the future (arXiv 2410.17891, sec. 3.3)."""
    annealing = recipe.curriculum.annealing
    if annealing.pattern == "none":
        return 1.0
    return min(1.0, (step + 1) / annealing.num_steps(recipe.training.steps))


def block_tokens(recipe: Recipe, step: int | None) -> int | None:
    """Return K at a step: the stage's; after all stages, or with `step` None, the objective's; None without blocks."""
    first = 0
    for stage in recipe.curriculum.block_sizes:
        end = first + stage.num_steps(recipe.training.steps)
        if step is not None and first <= step < end:
            return stage.block_tokens
        first = end
    return recipe.objective.block_tokens


def visibility(
    recipe: Recipe, is_causal: bool, step: int | None, document_ids: np.ndarray, device: torch.device
) -> Visibility:
    """Return the attention visibility of one micro-batch, before an objective adds the borders of its blocks.

    Args:
        recipe: the recipe, which sets the annealing and whether documents see each other.
        is_causal: whether the objective is causal; its attention stays causal.
        step: the optimizer step; None for the state after all annealing, which validation and evaluation use.
        document_ids: [B, L] on the host, -1 for padding.
        device: the device of the mask.
    """
    documents = documents_apart(document_ids, recipe.data.document_mask, device)
    if is_causal:
        return Visibility("causal", document_ids=documents)
    ratio = 1.0 if step is None else annealing_ratio(recipe, step)
    reach = block_tokens(recipe, step) or document_ids.shape[1]  # the future within a block ends with it
    return annealed(recipe.curriculum.annealing.pattern, ratio, step or 0, reach, documents)
