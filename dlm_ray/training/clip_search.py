"""BD3-LM's clip search during training: at intervals, the candidate with the least variance replaces the clip."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
import torch.distributed as dist

from dlm_ray.config.recipe import Recipe
from dlm_ray.data.reading import DataSequence
from dlm_ray.diffusion import clip_search
from dlm_ray.diffusion.absorbing import Absorbing, Clip
from dlm_ray.diffusion.clip_search import ClipStatistics
from dlm_ray.diffusion.objectives.block import Block
from dlm_ray.training import curriculum
from dlm_ray.training.step import TrainModule
from dlm_ray.training.validate import reshard

log = logging.getLogger(__name__)


def is_due(recipe: Recipe, step: int) -> bool:
    """Return whether a search follows `step` steps: never within the stages of block sizes, which differ."""
    search_config = recipe.curriculum.clip_search
    staged = recipe.curriculum.num_staged_steps(recipe.training.steps)
    return search_config is not None and step >= staged and step % search_config.every_steps == 0


def search(
    recipe: Recipe,
    root: TrainModule,
    objective: Block,
    sequences: Sequence[DataSequence],
    rank: int,
    world_size: int,
    device: torch.device,
) -> list[ClipStatistics]:
    """Measure the paper's candidates on held-out sequences, and return them with the least variance first.

    Collective: every rank passes the same sequences and gets the same result.
    """
    search_config = recipe.curriculum.clip_search
    assert search_config is not None, "the recipe has a clip search"
    sequences = sequences[: search_config.sequences]
    x_0 = np.stack([sequence.input_ids for sequence in sequences]).astype(np.int64)
    document_ids = np.stack([sequence.document_ids for sequence in sequences])
    clips = clip_search.candidates(recipe.objective.clip.enforce if recipe.objective.clip else "none")
    with torch.no_grad():
        totals = clip_search.clip_sums(
            lambda batch, draws: root(batch, draws=draws),
            objective,
            clips,
            x_0,
            document_ids,
            lambda ids: curriculum.visibility(recipe, False, None, ids, device),
            device,
            num_draws=search_config.draws,
            seed=recipe.seed,
            micro_batch_size=recipe.training.micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
    reshard(root)
    dist.all_reduce(totals)
    return clip_search.clip_statistics(clips, totals)


def apply(recipe: Recipe, objective: Block, interval: Sequence[float]) -> tuple[float, float]:
    """Set the clip of the objective to [beta, omega], with the recipe's weight and enforcement; return the interval."""
    clip_config = recipe.objective.clip
    beta, omega = interval
    weight = clip_config.weight if clip_config else "unbiased"
    clip = Clip(beta, omega, weight, clip_config.enforce if clip_config else "none")
    objective.process = replace(cast("Absorbing", objective.process), clip=clip)
    log.info("clip [%g, %g] from here on", beta, omega)
    return beta, omega
