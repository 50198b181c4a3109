"""The randomness of a batch: time t in strata over the global batch, and which tokens are masked.

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

from dlm_ray.diffusion.schedules import Schedule

# Streams keep the uses of one seed apart.
STRATA, TIME, MASK, EVALUATION_TIME, EVALUATION_MASK, SAMPLING = range(6)

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
    global_batch_rows: int


@dataclass(frozen=True)
class Draw:
    """The randomness of one micro-batch, and the positions that it scores."""

    t: Tensor
    """[B] float32 in (0, 1)."""
    is_masked: Tensor
    """[B, L] bool; the only record of what is masked (a token may look like the mask)."""
    scored: Tensor
    """[R] int64, flat indices into B*L, padded with indices of weight 0."""
    weight: Tensor
    """[R] float32: the weight of each scored position in the loss; 0 for padding."""
    num_maskable: int
    """Tokens that could be masked: the tokens that a bound per token is divided by."""
    num_scored: int
    """Positions that are scored, padding left out."""

    def to(self, device: torch.device) -> Draw:
        """The same draw with its tensors on `device`; the counts stay on the host."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("t", "is_masked", "scored", "weight")}
        return replace(self, **moved)


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


def stratified_times(key: DrawKey) -> np.ndarray:
    """[B] float64: t in (0, 1), one stratum of width 1/global_batch_rows each, the strata permuted anew in every step.

    The permutation keeps a row's place in the batch from deciding its t (as it does in BD3-LM's code).
    """
    strata = generator(key.seed, STRATA, key.step, 0).permutation(key.global_batch_rows)
    inside = np.array([_open_uniform(generator(key.seed, TIME, key.step, row)) for row in key.rows])
    return (strata[list(key.rows)] + inside) / key.global_batch_rows


def evaluation_times(seed: int, rows: Sequence[int], num_draws: int) -> np.ndarray:
    """[B, num_draws] float64: each row's own strata over its draws, in an order of its own."""
    times = np.empty((len(rows), num_draws))
    for i, row in enumerate(rows):
        random = generator(seed, EVALUATION_TIME, 0, row)
        times[i] = (random.permutation(num_draws) + random.uniform(2**-53, 1.0, size=num_draws)) / num_draws
    return times


def mask_draw(seed: int, stream: int, keys: Sequence[tuple[int, int]], t: np.ndarray, maskable: np.ndarray, schedule: Schedule) -> Draw:
    """q(x_t | x_0): every maskable token is masked with probability 1 - alpha(t), independently.

    Args:
        seed, stream: with the keys, what the random numbers depend on.
        keys: B pairs (step, row); in evaluation the number of the draw stands for the step.
        t: [B] times.
        maskable: [B, L] bool.
        schedule: gives the probability and the ELBO weight of every masked position.
    """
    times = torch.from_numpy(t)  # [B] float64
    probability = schedule.mask_probability(times).numpy()
    num_positions = maskable.shape[1]
    uniform = np.stack([generator(seed, stream, step, row).random(num_positions) for step, row in keys])  # [B, L]
    is_masked = (uniform < probability[:, None]) & maskable
    weight = schedule.weight(times).numpy()
    scored = np.flatnonzero(is_masked)
    return make_draw(t, is_masked, scored, weight[scored // num_positions], int(maskable.sum()))


def make_draw(t: np.ndarray, is_masked: np.ndarray, scored: np.ndarray, weight: np.ndarray, num_maskable: int) -> Draw:
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
        num_maskable=num_maskable,
        num_scored=len(scored),
    )


def _open_uniform(random: np.random.Generator) -> float:
    """Uniform on (0, 1): 0 would make the ELBO weight infinite."""
    return random.uniform(2**-53, 1.0)
