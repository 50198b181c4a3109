"""The per-slot tensors of block sampling, on the host: the canvas of each block, its step and its random numbers.

S: number of slots in a call; A: slots in use; K: positions of a block; W: steps of a window (`slots.window`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dlm_ray.diffusion.samplers.requests import SamplingParams
from dlm_ray.diffusion.samplers.rules import Canvas
from dlm_ray.diffusion.samplers.slots import num_steps, times, window


class SlotTensors:
    """The tensors that belong to slots; row b of each belongs to slot b.

    Args:
        num_slots: number of slots.
        block_tokens: K.
        window_steps: steps whose random numbers are kept at once.
    """

    def __init__(self, num_slots: int, block_tokens: int, window_steps: int):
        self.block_tokens = block_tokens
        shape = (num_slots, block_tokens)
        self.ids = torch.zeros(shape, dtype=torch.int64)
        self.is_masked = torch.zeros(shape, dtype=torch.bool)
        self.is_open = torch.zeros(shape, dtype=torch.bool)
        # The finished block before the current one, which the next call writes into the cache.
        self.uncommitted = torch.zeros(shape, dtype=torch.int64)
        # Positions for which the slot's next step wants proposals.
        self.wanted = torch.zeros(shape, dtype=torch.bool)
        # Positions that the slot's next step masks again.
        self.remasked_again = torch.zeros(shape, dtype=torch.bool)
        self.step = torch.zeros(num_slots, dtype=torch.int64)
        # Log-probability of every revealed token, if the request streams its canvas.
        self.confidence = torch.zeros(shape, dtype=torch.float64)
        # [slots, W, 2, K]: numbers for tokens, and for positions.
        self.uniform = torch.zeros(num_slots, window_steps, 2, block_tokens, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, slots: Sequence[int] | Tensor) -> Canvas:
        """Return a copy of the canvas of some slots; a slot may occur several times."""
        index = torch.as_tensor(slots, dtype=torch.int64)
        return Canvas(self.ids[index], self.is_masked[index], self.is_open[index])

    def move(self, source: int, target: int) -> None:
        """Copy everything of slot `source` to slot `target`."""
        for tensor in (
            self.ids,
            self.is_masked,
            self.is_open,
            self.uncommitted,
            self.wanted,
            self.remasked_again,
            self.step,
            self.confidence,
            self.uniform,
        ):
            tensor[target] = tensor[source]

    def reset(self, slot: int, given: Sequence[int]) -> None:
        """Start a block: the first positions hold the ids `given`, all others are masked, and the step is 0."""
        self.ids[slot, : len(given)] = torch.tensor(given, dtype=torch.int64)
        self.is_masked[slot] = self.is_open[slot] = torch.arange(self.block_tokens) >= len(given)
        self.remasked_again[slot] = False
        self.confidence[slot] = 0.0
        self.step[slot] = 0

    def reserve_window(self, window_steps: int) -> None:
        """Make room for the random numbers of at least `window_steps` steps."""
        missing = window_steps - self.uniform.shape[1]
        if missing > 0:
            self.uniform = torch.nn.functional.pad(self.uniform, (0, 0, 0, 0, 0, missing))

    def refill_uniform(self, slot: int, random: np.random.Generator, window_steps: int) -> None:
        """Generate the random numbers of the next `window_steps` steps of a slot."""
        self.uniform[slot, :window_steps] = torch.from_numpy(random.random((window_steps, 2, self.block_tokens)))

    def find_steps(self, params: SamplingParams, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Find the next step of each slot that reveals or remasks something, within the current window of steps.

        The canvas does not change before that step, so a window of steps is evaluated as one batch. Sets `wanted` and
        `remasked_again` of the slots.

        Returns:
            step [S] int64: the step found, or the first step of the next window; and is_found [S] bool.
        """
        index, rule, width = torch.tensor(slots), params.rule, window(params, self.block_tokens)
        now = self.step[index]  # [S]
        if not rule.is_timed:  # every step of an untimed rule wants proposals
            canvas = self.select(index)
            self.wanted[index] = rule.wanted(canvas, *times(params, now), self.uniform[index, now, 1])
            return now, torch.ones(len(slots), dtype=torch.bool)
        steps = (now - now % width)[:, None] + torch.arange(width)  # [S, W]
        is_ahead = (steps >= now[:, None]) & (steps < num_steps(params, self.block_tokens))
        t, s = times(params, steps.flatten())
        uniform = self.uniform[index[:, None], steps % width, 1].flatten(0, 1)  # [S * W, K]
        canvas = self.select(index.repeat_interleave(width))
        shape = (*steps.shape, self.block_tokens)
        wanted = rule.wanted(canvas, t, s, uniform).view(shape) & is_ahead[:, :, None]
        remasked = torch.zeros_like(wanted)
        if rule.remasks:
            remasked = rule.remasked(canvas, t, s, uniform).view(shape) & is_ahead[:, :, None]
        has_effect = (wanted | remasked).any(-1)  # [S, W]
        is_found, first = has_effect.any(1), has_effect.int().argmax(1)
        rows = torch.arange(len(slots))
        self.wanted[index], self.remasked_again[index] = wanted[rows, first], remasked[rows, first]
        return torch.where(is_found, steps[rows, first], steps[:, -1] + 1), is_found
