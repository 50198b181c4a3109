"""A slot of block sampling: whose text it holds, by which way, and what its next network call is for; and the steps of a way."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dlm_ray.diffusion.samplers.drawing import draw_tokens, log_probability
from dlm_ray.diffusion.samplers.requests import SamplingParams, SequenceState
from dlm_ray.diffusion.samplers.whole_canvas import grid_times

# Steps of a block whose random numbers are made at once, and which are looked through at once for one that wants something.
LOOK_AHEAD_STEPS = 128


class SlotState(enum.Enum):
    """What a slot waits for."""

    ADVANCING = "its next step is not known yet"
    NEEDS_FORWARD = "wants proposals that need a network call"
    CLEAN = "its block is finished; other candidates for it are not"
    COMMITTING = "its block is finished and belongs into the cache"
    FULL = "its cache has no room for another block: its last half context is to be encoded again"
    LEAVING = "its text is finished"


@dataclass(eq=False)
class Slot:
    """One candidate of one text."""

    text: SequenceState
    candidate: int
    random: np.random.Generator
    """Of the current block."""
    params: SamplingParams
    state: SlotState = SlotState.ADVANCING


def by_params(slots: Sequence[Slot]) -> list[tuple[SamplingParams, list[int]]]:
    """The ways of some slots, each with its places among them: a rule serves its slots in one batch."""
    places: dict[SamplingParams, list[int]] = {}
    for place, slot in enumerate(slots):
        places.setdefault(slot.params, []).append(place)
    return list(places.items())


def num_steps(params: SamplingParams, block_tokens: int) -> int:
    """Steps of a block; a rule without times takes one a position at most."""
    return params.num_steps if params.rule.is_timed else block_tokens


def window(params: SamplingParams, block_tokens: int) -> int:
    """Steps whose random numbers lie ready."""
    return min(params.num_steps, LOOK_AHEAD_STEPS) if params.rule.is_timed else block_tokens


def times(params: SamplingParams, step: Tensor) -> tuple[Tensor, Tensor]:
    """The times t, s [n] of steps [n]; of a rule without times, any."""
    grid = _grid(params.grid, params.num_steps)
    return grid[step.clamp(max=params.num_steps)], grid[(step + 1).clamp(max=params.num_steps)]


def draw_by_params(logits: Tensor, uniform: Tensor, number: Tensor, ways: Sequence[SamplingParams]) -> Tensor:
    """Return what is drawn from logits [n, V], each row by the way of its `number` [n]: tokens, what their rule ranks by, log-probability [n, 3].

    Rows of number -1 are nobody's, whatever they get. The log-probability is 0 where a way is not shown. Tokens are float64, too, which holds
    them exactly: one tensor to bring back from the device.
    """
    drawn = torch.zeros(len(logits), 3, dtype=torch.float64, device=logits.device)
    for each, params in enumerate(ways):
        own = (
            (number == each).nonzero()[:, 0] if len(ways) > 1 else slice(None)
        )  # looking at `number` would wait for the device
        ranking = params.rule.confidence
        tokens, ranked = draw_tokens(logits[own], uniform[own], params.temperature, params.top_p, ranking)
        shown = torch.zeros_like(ranked)
        if params.stream_canvas:
            shown = ranked if ranking == "probability" else log_probability(tokens, logits[own])
        drawn[own] = torch.stack((tokens, ranked, shown), 1)
    return drawn


@lru_cache(maxsize=64)
def _grid(name: str, num_steps: int) -> Tensor:
    return torch.tensor(grid_times(name, num_steps), dtype=torch.float64)
