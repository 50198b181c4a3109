"""The randomness of a batch: the times t of the global batch, and the uniform numbers that decide what is masked.

Every number is a pure function of (seed, stream, step, global row index), by numpy's counter-based Philox. So neither the number
of workers nor the micro-batch nor a restart changes a mask, and the draws are made on the host, where the step needs no
synchronisation to know their counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

# Streams keep the uses of one seed apart.
STRATA, TIME, MASK, EVALUATION_TIME, EVALUATION_MASK, SAMPLING, JUMP, NOISE, GUMBEL, COUNT, BLOCK_TIME = range(11)

# Scored positions are padded with weight 0 to a multiple of this: shapes repeat, and no rank of FSDP2 ever has nothing to score.
ROW_MULTIPLE = 128


def generator(seed: int, stream: int, step: int, row: int) -> np.random.Generator:
    """The random numbers of one row in one step; rows, steps and streams never share any."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, row, step]))


@dataclass(frozen=True)
class DrawKey:
    """Which rows of which step a draw is for."""

    seed: int
    step: int
    rows: Sequence[int]
    """Indices of the rows within the global batch."""
    global_batch_size: int
    block_tokens: int | None = None
    """Positions of a block that has a t of its own, where the step decides (a curriculum over block sizes); None: as the objective says."""


@dataclass(frozen=True)
class Draw:
    """The randomness of one micro-batch, and the positions that it scores."""

    t: Tensor
    """[B], or [B, blocks], float32 in (0, 1)."""
    is_masked: Tensor
    """[B, L] bool; the only record of what is masked (a token may look like the mask)."""
    scored: Tensor
    """[R] int64, flat indices into B*L, padded with indices of weight 0."""
    weight: Tensor
    """[R] float32: the weight of each scored position in the loss; 0 for padding."""
    maskable: Tensor
    """[B, L] bool: the positions that could be masked; all others are context that is never scored."""
    num_maskable: int
    """How many of them: the tokens that a bound per token is divided by."""
    num_scored: int
    """Positions that are scored, padding left out."""
    noise_seeds: tuple[int, ...] = ()
    """Of every row, for an objective whose noise is made on the device."""

    @property
    def is_scored(self) -> Tensor:
        """[R] bool: which of `scored` are positions, and not padding; a position's own weight may be 0."""
        return torch.arange(len(self.scored), device=self.scored.device) < self.num_scored

    @property
    def t_scored(self) -> Tensor:
        """[R]: the time of every scored position, its block's if blocks have their own."""
        return self.t.flatten()[self.scored // (self.maskable.numel() // self.t.numel())]

    def to(self, device: torch.device) -> Draw:
        """The same draw with its tensors on `device`; the counts stay on the host."""
        names = ("t", "is_masked", "scored", "weight", "maskable")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def maskable_positions(document_ids: np.ndarray) -> np.ndarray:
    """Where a token may be masked and is scored: everywhere but at the start token of a segment and in padding.

    Args:
        document_ids: [B, L] int; a change starts a segment, -1 is padding.

    Returns:
        [B, L] bool.
    """
    maskable = document_ids >= 0
    maskable[:, 0] = False
    maskable[:, 1:] &= document_ids[:, 1:] == document_ids[:, :-1]
    return maskable


def times(mode: str, key: DrawKey, num_blocks: int = 1) -> np.ndarray:
    """[B, num_blocks] float64: t in (0, 1) for every block of every row; a row with one t is one block.

    Args:
        mode: how the K * num_blocks times of a global batch of K rows hang together.
            `stratified`: one stratum of width 1 / (K num_blocks) each, dealt out by a permutation that is new in every step, so that
            neither a row's place in the batch nor a block's place in the row decides its t.
            `antithetic`: one u for all, t_i = (u + i / (K num_blocks)) mod 1 (MD4's low-discrepancy draw, over the whole global batch).
            `independent`: each its own.
            `paper`: strata in the order of BD3-LM's code, where t rises along a row; kept to show what that does.
        key: which rows.
        num_blocks: blocks of a row that have a time each.
    """
    total = key.global_batch_size * num_blocks
    cells = np.array(key.rows)[:, None] * num_blocks + np.arange(
        num_blocks
    )  # [B, num_blocks], numbers within the global batch
    if mode == "antithetic":
        shared = generator(key.seed, STRATA, key.step, 0).uniform(2**-53, 1.0)
        return np.maximum((shared + cells / total) % 1.0, 2**-53)
    inside = np.stack(
        [generator(key.seed, TIME, key.step, row).uniform(2**-53, 1.0, size=num_blocks) for row in key.rows]
    )
    if mode == "independent":
        return inside
    if mode == "stratified":
        cells = generator(key.seed, STRATA, key.step, 0).permutation(total)[cells]
    else:
        assert mode == "paper", f"unknown mode of times {mode!r}"
    return (cells + inside) / total


def evaluation_times(seed: int, rows: Sequence[int], num_draws: int) -> np.ndarray:
    """[B, num_draws] float64: each row's own strata over its draws, in an order of its own."""
    times = np.empty((len(rows), num_draws))
    for i, row in enumerate(rows):
        random = generator(seed, EVALUATION_TIME, 0, row)
        times[i] = (random.permutation(num_draws) + random.uniform(2**-53, 1.0, size=num_draws)) / num_draws
    return times


def uniforms(seed: int, stream: int, keys: Sequence[tuple[int, int]], num_positions: int) -> np.ndarray:
    """[B, L] float64 in [0, 1) for B pairs (step, row); in evaluation the number of the draw stands for the step."""
    return np.stack([generator(seed, stream, step, row).random(num_positions) for step, row in keys])


def make_draw(
    t: np.ndarray, is_masked: np.ndarray, scored: np.ndarray, weight: np.ndarray, maskable: np.ndarray
) -> Draw:
    """A Draw from host arrays: pads the scored positions to a multiple of ROW_MULTIPLE with position 1 at weight 0."""
    padded = max(1, -(-len(scored) // ROW_MULTIPLE)) * ROW_MULTIPLE
    positions = np.ones(padded, dtype=np.int64)
    positions[: len(scored)] = scored
    weights = np.zeros(padded, dtype=np.float32)
    weights[: len(scored)] = weight
    return Draw(
        t=torch.from_numpy(t.astype(np.float32)),
        is_masked=torch.from_numpy(is_masked),
        scored=torch.from_numpy(positions),
        weight=torch.from_numpy(weights),
        maskable=torch.from_numpy(maskable),
        num_maskable=int(maskable.sum()),
        num_scored=len(scored),
    )
