"""Searches the clip [beta, omega] to train a block size with, as BD3-LM does (arXiv 2503.09573, section 5.2).

Every candidate scores the same sequences with the same random numbers, after one shared pass over x_0. The candidate
with the lowest variance wins. The statistic is the paper's: the variance over blocks of the mean weighted loss of a
block's tokens, with weight 1/p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dlm_ray.diffusion.absorbing import Absorbing, Clip
from dlm_ray.diffusion.denoiser import Batch
from dlm_ray.diffusion.draws import Draw, DrawKey, maskable_positions
from dlm_ray.diffusion.objectives.block import Block
from dlm_ray.diffusion.visibility import Visibility

WIDTHS = (0.5, 0.6, 0.7, 0.8, 0.9)
STEP = 0.05
FULL_RANGE = (1e-3, 1.0)


@dataclass(frozen=True)
class ClipStatistics:
    """The statistics of one candidate over all sequences and draws."""

    beta: float
    omega: float
    variance: float
    """Variance over blocks of the mean weighted loss of a block, in (nats per token) squared."""
    mean: float
    """Mean of that loss in nats per token; not comparable between clips, whose ranges differ."""
    masked_tokens: float
    """Masked tokens per block and draw; more of them lower the variance by themselves."""
    gradient_variance: float | None = None
    """Sum over parameters of the variance of the batch's gradient (Eq. 10); None if not measured."""


def candidates(enforce: Literal["none", "counts"] = "none") -> list[Clip]:
    """Return the paper's 36 intervals: the full range, and widths 0.5 to 0.9 at starts 0.05 apart.

    For blocks of two or more tokens, `enforce` can enforce each interval.
    """
    clips = [Clip(*FULL_RANGE, "paper", enforce)]
    for width in WIDTHS:
        for number in range(round((1 - width) / STEP) + 1):
            beta = round(number * STEP, 2)
            clips.append(Clip(beta or FULL_RANGE[0], round(beta + width, 2), "paper", enforce))
    return clips


def clip_sums(
    score: Callable[[Batch, Sequence[Draw]], Sequence[Tensor]],
    objective: Block,
    clips: Sequence[Clip],
    x_0: np.ndarray,
    document_ids: np.ndarray,
    visibility_of: Callable[[np.ndarray], Visibility],
    device: torch.device,
    *,
    num_draws: int,
    seed: int,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return sums [clips, 4] float64 over this rank's share of sequences and draws.

    The columns are: blocks, sum and sum of squares of the blocks' mean loss, and masked tokens.

    Args:
        score: takes a batch and draws of its sequences, returns the nats [R] of each draw (`Block.nll_of_draws`); every
            rank calls it the same number of times.
        objective: a `Block`, whose process makes the draws.
        clips: the candidates.
        x_0, document_ids: [N, L] of all sequences.
        visibility_of: returns the visibility of a batch, given its document ids [B, L].
        device: device of the network.
        num_draws: draws of every sequence.
        seed: seed of the draws, which all candidates share.
        micro_batch_size: sequences of a batch.
        rank, world_size: rank and number of the processes that share the work.
        progress: called with (batches done, batches).
    """
    process = objective.process
    assert isinstance(process, Absorbing), "only the absorbing process has a clip"
    assert not process.complementary, "a clip has no complement: its masked shares are within the interval"
    total = torch.zeros(len(clips), 4, dtype=torch.float64, device=device)
    pairs = [(number, sequence) for number in range(num_draws) for sequence in range(len(x_0))]
    rank_pairs = np.array_split(np.arange(len(pairs)), world_size)[rank]
    num_batches = math.ceil(math.ceil(len(pairs) / world_size) / micro_batch_size)
    for done, numbers in enumerate(np.array_split(rank_pairs, num_batches)):
        batch_pairs = [pairs[i] for i in numbers] or [pairs[0]]
        sequences = [sequence for _, sequence in batch_pairs]
        maskable = maskable_positions(document_ids[sequences]) & (len(numbers) > 0)
        # The key combines draw number and sequence, so that draws of one sequence differ.
        indices = [number * len(x_0) + sequence for number, sequence in batch_pairs]
        key = DrawKey(seed, 0, indices, len(pairs), objective.block_tokens)
        draws = [replace(process, clip=clip, weight="elbo").draw(key, maskable).to(device) for clip in clips]
        batch = Batch(torch.from_numpy(x_0[sequences]).to(device), draws[0], visibility_of(document_ids[sequences]))
        open_blocks = torch.from_numpy(maskable.reshape(-1, objective.block_tokens).any(1)).to(device)
        for i, (draw, nll) in enumerate(zip(draws, score(batch, draws), strict=True)):
            total[i] += _block_sums(draw, nll, open_blocks, objective.block_tokens)
        if progress is not None:
            progress(done + 1, num_batches)
    return total


def _block_sums(draw: Draw, nll: Tensor, open_blocks: Tensor, block_tokens: int) -> Tensor:
    """Return the sums [4] of one draw, with the columns of `clip_sums`.

    Args:
        draw: the draw.
        nll: [R] nats of its scored positions, without weights.
        open_blocks: [B * blocks] bool: the blocks with a maskable token, which count.
        block_tokens: K.
    """
    by_block = torch.zeros(len(open_blocks), dtype=torch.float64, device=nll.device)
    count = draw.num_scored  # the rest is padding
    by_block.index_add_(0, draw.scored[:count] // block_tokens, (draw.weight * nll)[:count].double())
    mean = by_block[open_blocks] / block_tokens
    num_masked = torch.tensor(float(count), dtype=torch.float64, device=nll.device)
    return torch.stack([open_blocks.sum().double(), mean.sum(), (mean**2).sum(), num_masked])


def clip_statistics(clips: Sequence[Clip], totals: Tensor) -> list[ClipStatistics]:
    """Return the statistics of all candidates from the sums of all ranks, sorted by variance."""
    results = []
    for clip, (count, total, squares, masked) in zip(clips, totals.tolist(), strict=True):
        variance = (squares - total**2 / count) / max(1.0, count - 1)
        results.append(ClipStatistics(clip.beta, clip.omega, variance, total / count, masked / count))
    return sorted(results, key=lambda result: result.variance)
