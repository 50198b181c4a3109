"""A slot of block sampling, its states, and the steps that its sampling parameters define."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dlm_ray.diffusion.samplers.requests import SamplingParams, SequenceState
from dlm_ray.diffusion.samplers.whole_canvas import grid_times

# Number of steps of a block whose random numbers are generated together, and which are searched together for the next
# step that has an effect.
LOOK_AHEAD_STEPS = 128


class SlotState(enum.Enum):
    """The state of a slot, which says what the slot waits for.

    ::

                           add
                            |
                            v
        +-------------> ADVANCING ----------------+ <---------------------+
        |                   | the next step       | no steps are left,    |
        | masks are left,   | wants proposals     | nothing is masked     |
        | or steps that     v                     |                       |
        +-- may remask -- NEEDS_FORWARD           |                       |
                            | the last mask       |                       |
                            | is revealed         |                       |
                            v                     |                       |
                          CLEAN <-----------------+                       |
                            | all candidates for this block are clean,    |
                            | one is kept                                 |
                 +----------+-------------+                               |
                 | the sequence continues | the sequence stops            |
                 v                        v                               |
             FINISHED                 LEAVING ---> the slot is free       |
                 | the next block begins                                  |
                 +---------------------+                                  |
                 | the cache has room  | the cache is full                |
                 |                     v                                  |
                 |                   FULL                                 |
                 |                     | the last half context            |
                 |                     | is encoded again                 |
                 +---------------------+----------------------------------+

    A slot that leaves FINISHED for ADVANCING has an uncommitted block: the next call that it takes part in writes that
    block into the cache, and takes the first step of the next block if it needs hidden states of the latter.
    `BlockSampler.remove` takes a slot from any state to LEAVING.
    """

    ADVANCING = "the next step that has an effect is not known yet"
    NEEDS_FORWARD = "the next step wants proposals of the network"
    CLEAN = "the block is finished, but other candidates for it are not"
    FINISHED = "the block is finished, and the next one has to begin"
    FULL = "the cache has no room for another block, so the last half context has to be encoded again"
    LEAVING = "the sequence is finished or was removed"


@dataclass(eq=False)
class Slot:
    """One candidate of one sequence."""

    sequence: SequenceState
    candidate: int
    random: np.random.Generator
    """The random number generator of the current block."""
    params: SamplingParams
    state: SlotState = SlotState.ADVANCING
    has_uncommitted: bool = False
    """Whether the block before the current one is finished, but not in the cache."""


def by_params(slots: Sequence[Slot]) -> list[tuple[SamplingParams, list[int]]]:
    """Group slots by sampling parameters and return the indices into `slots`: a rule handles its slots as one batch."""
    indices: dict[SamplingParams, list[int]] = {}
    for index, slot in enumerate(slots):
        indices.setdefault(slot.params, []).append(index)
    return list(indices.items())


def num_steps(params: SamplingParams, block_tokens: int) -> int:
    """Return the number of steps of a block; a rule without times takes at most one step per position."""
    return params.num_steps if params.rule.is_timed else block_tokens


def window(params: SamplingParams, block_tokens: int) -> int:
    """Return the number of steps whose random numbers are generated together."""
    return min(params.num_steps, LOOK_AHEAD_STEPS) if params.rule.is_timed else block_tokens


def times(params: SamplingParams, step: Tensor) -> tuple[Tensor, Tensor]:
    """Return the times t, s [n] of the steps [n]; a rule without times ignores them."""
    grid = _grid(params.grid, params.num_steps)
    return grid[step.clamp(max=params.num_steps)], grid[(step + 1).clamp(max=params.num_steps)]


@lru_cache(maxsize=64)
def _grid(name: str, num_steps: int) -> Tensor:
    return torch.tensor(grid_times(name, num_steps), dtype=torch.float64)
