"""What one denoising step reveals: a rule takes a canvas from time t to an earlier time s.

A rule asks `propose` for tokens at the positions it wants and at no others, so that nobody computes logits that nobody needs.
Revealed tokens never change. Positions are flat indices into the canvas [B, L].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dlm_ray.diffusion.schedules import Schedule

Propose = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Flat positions [N] -> (tokens [N] drawn at the asked temperature and top-p, log-probabilities [N] of those tokens under the model)."""


@dataclass(frozen=True)
class Canvas:
    """The state of sampling."""

    ids: Tensor
    """[B, L] int64; arbitrary where masked."""
    is_masked: Tensor
    """[B, L] bool."""

    def revealed(self, positions: Tensor, tokens: Tensor) -> Canvas:
        """The canvas with `tokens` at flat `positions`."""
        ids, is_masked = self.ids.flatten().clone(), self.is_masked.flatten().clone()
        ids[positions], is_masked[positions] = tokens, False
        return Canvas(ids.view_as(self.ids), is_masked.view_as(self.is_masked))


class Rule(Protocol):
    """One denoising step."""

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """From time t to s < t; `uniform` [B, L] float64 in [0, 1) is the step's own randomness for choosing positions."""


@dataclass(frozen=True)
class Ancestral:
    """q(x_s | x_t, x_0 = prediction): every masked token is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t) (MD4, Eq. 2)."""

    schedule: Schedule

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """Positions by coin, tokens from the model; no network call if no position is chosen."""
        now, then = (self.schedule.mask_probability(torch.tensor(time, dtype=torch.float64)).item() for time in (t, s))
        positions = (canvas.is_masked & (uniform >= then / now)).flatten().nonzero()[:, 0]
        return canvas.revealed(positions, propose(positions)[0]) if len(positions) else canvas


@dataclass(frozen=True)
class Confidence:
    """Of each row, the proposals with the highest log-probability are revealed, as many as the schedule expects (DiffuLLaMA, section 3.4)."""

    schedule: Schedule
    num_maskable: Tensor
    """[B] int64: masked positions at the start."""

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """Leaves floor(num_maskable * (1 - alpha_s)) positions of each row masked; no network call if that reveals none."""
        then = self.schedule.mask_probability(torch.tensor(s, dtype=torch.float64)).item()
        num_kept = (self.num_maskable * then).floor().long()
        num_revealed = (canvas.is_masked.sum(1) - num_kept).clamp(min=0)  # [B]
        wanted = canvas.is_masked & (num_revealed > 0)[:, None]
        positions = wanted.flatten().nonzero()[:, 0]
        if not len(positions):
            return canvas
        tokens, log_probs = propose(positions)
        confidence = torch.full(canvas.is_masked.shape, float("-inf"), dtype=log_probs.dtype, device=log_probs.device)
        confidence.view(-1)[positions] = log_probs
        rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        chosen = (wanted & (rank < num_revealed[:, None])).flatten()[positions]
        return canvas.revealed(positions[chosen], tokens[chosen])


@dataclass(frozen=True)
class LeftToRight:
    """The first masked position of each row: how an autoregressive model writes."""

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """One token a row and step."""
        first = canvas.is_masked & (canvas.is_masked.cumsum(1) == 1)
        positions = first.flatten().nonzero()[:, 0]
        return canvas.revealed(positions, propose(positions)[0]) if len(positions) else canvas
