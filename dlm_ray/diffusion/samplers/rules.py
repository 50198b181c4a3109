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

from dlm_ray.diffusion.objectives.sedd import log_normaliser
from dlm_ray.diffusion.schedules import Schedule, at

Reveal = Callable[[Tensor, Tensor], Tensor]
"""probs [n, V] at the asked temperature and top-p, and logits [n, V] as the network gave them -> [n, V] probability of becoming each token,
with a sum of at most 1: what is missing is the probability of staying masked."""


class Propose(Protocol):
    """What a rule may ask the network for, at flat positions [N] of the canvas."""

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N] drawn at the asked temperature and top-p, and their log-probabilities [N] under the model."""

    def transition(self, positions: Tensor, reveal: Reveal) -> tuple[Tensor, Tensor]:
        """One draw over the V tokens and the mask: tokens [N], and whether each was revealed [N]."""


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
    """q(x_s | x_t, x_0 = prediction): every masked token is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t) (MD4, Eq. 2).

    With `joint`, coin and token are one draw over V + 1 outcomes, MD4's Algorithm 2: the same law in honest arithmetic, and another one
    with float32 Gumbel noise, which cannot draw outcomes below about 1e-8.
    """

    schedule: Schedule
    joint: bool = False

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """Positions by coin, tokens from the model; no network call if no position is chosen."""
        kept = kept_share(self.schedule, t, s)
        if self.joint:
            return _transition(canvas, propose, lambda probs, logits: (1 - kept) * probs)
        positions = (canvas.is_masked & (uniform >= kept)).flatten().nonzero()[:, 0]
        return canvas.revealed(positions, propose(positions)[0]) if len(positions) else canvas


@dataclass(frozen=True)
class StateDependent:
    """GenMD4: a masked token becomes v with probability (1 - (s/t)^{w_v}) mu_v; the larger w_v, the earlier v is revealed."""

    exponents: Tensor
    """[V] w."""

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """One draw over V + 1 outcomes at every masked position."""
        becomes = 1 - (s / t) ** self.exponents.double()
        return _transition(canvas, propose, lambda probs, logits: becomes * probs)


@dataclass(frozen=True)
class Tweedie:
    """SEDD's analytic step: a masked token becomes v with probability s_v (e^D - 1), D = ln(alpha_s / alpha_t).

    With s_v = r Z mu_v that is Z (alpha_s - alpha_t) / (1 - alpha_t) mu_v: MD4's step times the network's Z, clamped where it exceeds 1. The
    last step drops the mask and normalises, as SEDD's final denoising does.
    """

    schedule: Schedule
    vocab_size: int

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """One draw over V + 1 outcomes at every masked position."""
        share = 1 - kept_share(self.schedule, t, s)

        def reveal(probs: Tensor, logits: Tensor) -> Tensor:
            if s == 0:
                return probs
            return (share * log_normaliser(logits, self.vocab_size).exp()).clamp(max=1.0)[:, None] * probs

        return _transition(canvas, propose, reveal)


@dataclass(frozen=True)
class Confidence:
    """Of each row, the proposals with the highest log-probability are revealed, as many as the schedule expects (DiffuLLaMA, section 3.4)."""

    schedule: Schedule
    num_maskable: Tensor
    """[B] int64: masked positions at the start."""

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """Leaves floor(num_maskable * (1 - alpha_s)) positions of each row masked; no network call if that reveals none."""
        num_kept = (self.num_maskable * (at(self.schedule.mask_probability, s) if s > 0 else 0.0)).floor().long()
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


def kept_share(schedule: Schedule, t: float, s: float) -> float:
    """(1 - alpha_s) / (1 - alpha_t): the probability of staying masked from t to s; 0 at s = 0, where a sampler has to end."""
    return at(schedule.mask_probability, s) / at(schedule.mask_probability, t) if s > 0 else 0.0


def _transition(canvas: Canvas, propose: Propose, reveal: Reveal) -> Canvas:
    positions = canvas.is_masked.flatten().nonzero()[:, 0]
    if not len(positions):
        return canvas
    tokens, is_revealed = propose.transition(positions, reveal)
    return canvas.revealed(positions[is_revealed], tokens[is_revealed])
