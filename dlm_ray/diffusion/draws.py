"""The randomness of a batch: the times t of the global batch, and the uniform numbers that decide the masks.

Every number is a pure function of (seed, stream, step, index of the draw), by numpy's counter-based Philox. So neither
the number of workers nor the micro-batch nor a restart changes a mask. The draws are made on the host, so that a step
needs no synchronisation to know their counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

# Streams keep the uses of one seed apart.
STRATA, TIME, MASK, EVALUATION_TIME, EVALUATION_MASK, SAMPLING, JUMP, NOISE, GUMBEL, COUNT, BLOCK_TIME = range(11)

# Scored positions are padded with weight 0 to a multiple of this: shapes repeat, and no rank of FSDP2 scores nothing.
ROW_MULTIPLE = 128


def generator(seed: int, stream: int, step: int, index: int) -> np.random.Generator:
    """Return the generator of draw `index` in one step; indices, steps and streams share no random numbers."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, index, step]))


@dataclass(frozen=True)
class DrawKey:
    """The key of a micro-batch's random numbers: the seed, the step, and the indices of its draws.

    A draw is one corruption of a sequence. A sequence that is corrupted several times in a batch has one index for each
    of its draws.
    """

    seed: int
    step: int
    indices: Sequence[int]
    """[B]: the index of each draw within the global batch."""
    global_batch_size: int
    """Number of draws in the global batch."""
    block_tokens: int | None = None
    """Positions of a block with its own t, if the step decides (a curriculum); None: the objective decides."""


@dataclass(frozen=True)
class Draw:
    """The randomness of one micro-batch, and its scored positions."""

    t: Tensor
    """[B], or [B, blocks], float32 in (0, 1)."""
    is_masked: Tensor
    """[B, L] bool: the only record of the masks (a token of the text may have the id of the mask)."""
    scored: Tensor
    """[R] int64: flat indices into B*L, padded with indices of weight 0."""
    weight: Tensor
    """[R] float32: the weight of each scored position in the loss; 0 for padding."""
    maskable: Tensor
    """[B, L] bool: the positions that could be masked; all others are context that is never scored."""
    num_maskable: int
    """Number of maskable positions: the tokens that divide a bound per token."""
    num_scored: int
    """Number of scored positions, without padding."""
    noise_seeds: tuple[int, ...] = ()
    """Seed of every draw, for an objective that makes its noise on the device."""

    @property
    def is_scored(self) -> Tensor:
        """Return [R] bool: which of `scored` are not padding; the weight of such a position may be 0."""
        return torch.arange(len(self.scored), device=self.scored.device) < self.num_scored

    @property
    def t_scored(self) -> Tensor:
        """Return [R]: the time of every scored position, or of its block if blocks have their own."""
        return self.t.flatten()[self.scored // (self.maskable.numel() // self.t.numel())]

    def to(self, device: torch.device) -> Draw:
        """Return the draw with its tensors on `device`; the counts stay on the host."""
        names = ("t", "is_masked", "scored", "weight", "maskable")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def maskable_positions(document_ids: np.ndarray) -> np.ndarray:
    """Return where a token may be masked and is scored: everywhere but at the start token of a segment and in padding.

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
    """Return [B, num_blocks] float64: t in (0, 1) for every block of every draw; a draw with one t is one block.

    Args:
        mode: how the K * num_blocks times of a global batch of K draws depend on each other.
            `stratified`: one stratum of width 1 / (K num_blocks) each, assigned by a new permutation in every step, so
            that neither the place of a draw in the batch nor of a block in the sequence decides its t.
            `antithetic`: one u for all, t_i = (u + i / (K num_blocks)) mod 1 (MD4's low-discrepancy draw, over the
            whole global batch).
            `independent`: independent times.
            `paper`: strata in the order of BD3-LM's code, where t rises along a sequence; kept to show its effect.
        key: the draws.
        num_blocks: blocks of a sequence, each with its own time.
    """
    total = key.global_batch_size * num_blocks
    # [B, num_blocks], numbers within the global batch
    cells = np.array(key.indices)[:, None] * num_blocks + np.arange(num_blocks)
    if mode == "antithetic":
        shared = generator(key.seed, STRATA, key.step, 0).uniform(2**-53, 1.0)
        return np.maximum((shared + cells / total) % 1.0, 2**-53)
    inside = np.stack(
        [generator(key.seed, TIME, key.step, index).uniform(2**-53, 1.0, size=num_blocks) for index in key.indices]
    )
    if mode == "independent":
        return inside
    if mode == "stratified":
        cells = generator(key.seed, STRATA, key.step, 0).permutation(total)[cells]
    else:
        assert mode == "paper", f"unknown mode of times {mode!r}"
    return (cells + inside) / total


def evaluation_times(seed: int, sequences: Sequence[int], num_draws: int) -> np.ndarray:
    """Return [B, num_draws] float64: strata over the draws of each sequence, given by its index, in a random order."""
    times = np.empty((len(sequences), num_draws))
    for i, sequence in enumerate(sequences):
        random = generator(seed, EVALUATION_TIME, 0, sequence)
        times[i] = (random.permutation(num_draws) + random.uniform(2**-53, 1.0, size=num_draws)) / num_draws
    return times


def uniforms(seed: int, stream: int, keys: Sequence[tuple[int, int]], num_positions: int) -> np.ndarray:
    """Return [B, L] float64 in [0, 1) for B pairs (step, index of the draw).

    Evaluation passes pairs (number of the draw, index of the sequence).
    """
    return np.stack([generator(seed, stream, step, index).random(num_positions) for step, index in keys])


def make_draw(
    t: np.ndarray, is_masked: np.ndarray, scored: np.ndarray, weight: np.ndarray, maskable: np.ndarray
) -> Draw:
    """Return a Draw from host arrays, whose scored positions are padded with position 1 at weight 0 to ROW_MULTIPLE."""
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
