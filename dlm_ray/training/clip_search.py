"""BD3-LM's clip search inside the training loop: every so many steps the clip is replaced by the one with the least variance."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dlm_ray.config.recipe import Recipe
from dlm_ray.diffusion import clip_search
from dlm_ray.diffusion.absorbing import Clip
from dlm_ray.diffusion.clip_search import Measured
from dlm_ray.training import curriculum
from dlm_ray.training.validate import reshard

log = logging.getLogger(__name__)


def is_due(recipe: Recipe, step: int) -> bool:
    """Whether the recipe searches after `step` steps: not within the stages of block sizes, of which none is the size that is measured."""
    asked = recipe.curriculum.clip_search
    staged = sum(stage.steps for stage in recipe.curriculum.block_sizes)
    return asked is not None and step >= staged and step % asked.every_steps == 0


def search(
    recipe: Recipe, root: Any, objective: Any, rows: Sequence[Any], rank: int, world_size: int, device: torch.device
) -> list[Measured]:
    """The paper's candidates on held-out rows, the least variance first. Collective: every rank passes the same rows and gets the same answer."""
    asked = recipe.curriculum.clip_search
    assert asked is not None, "the recipe searches"
    rows = rows[: asked.sequences]
    x_0 = np.stack([row.input_ids for row in rows]).astype(np.int64)
    document_ids = np.stack([row.document_ids for row in rows])
    clips = clip_search.candidates(recipe.objective.clip.enforce if recipe.objective.clip else "none")
    with torch.no_grad():
        totals = clip_search.sums(
            lambda batch, draws: root(batch, draws=draws),
            objective,
            clips,
            x_0,
            document_ids,
            lambda ids: curriculum.visibility(recipe, False, None, ids, device),
            device,
            num_draws=asked.draws,
            seed=recipe.seed,
            micro_batch_size=recipe.training.micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
    reshard(root)
    dist.all_reduce(totals)
    return clip_search.measured(clips, totals)


def apply(recipe: Recipe, objective: Any, interval: Sequence[float]) -> tuple[float, float]:
    """Trains on [beta, omega] from here on, with the weights and the enforcement that the recipe asks for; returns the two."""
    asked = recipe.objective.clip
    beta, omega = interval
    clip = Clip(beta, omega, asked.weight if asked else "unbiased", asked.enforce if asked else "none")
    objective.process = replace(objective.process, clip=clip)
    log.info("clip [%g, %g] from here on", beta, omega)
    return beta, omega
