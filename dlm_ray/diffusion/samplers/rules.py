"""What one denoising step reveals: a rule takes a canvas from time t to an earlier time s.

A rule asks for tokens at the positions it wants and at no others, so that nobody computes logits that nobody needs. Most rules are
`SelectionRule`: they say where they want proposals, then which of them they take, and so they serve the whole canvas and blocks over a cache
alike. The others draw token and coin at once, on the whole canvas. Positions are flat indices into the canvas [B, L].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dlm_ray.diffusion.objectives.sedd import log_normaliser
from dlm_ray.diffusion.samplers.drawing import Ranking
from dlm_ray.diffusion.schedules import Schedule

Reveal = Callable[[Tensor, Tensor], Tensor]
"""probs [n, V] at the asked temperature and top-p, and logits [n, V] as the network gave them -> [n, V] probability of becoming each token,
with a sum of at most 1: what is missing is the probability of staying masked."""


class Propose(Protocol):
    """What a rule may ask the network for, at flat positions [N] of the canvas."""

    def __call__(self, positions: Tensor, confidence: Ranking | None) -> tuple[Tensor, Tensor | None]:
        """Tokens [N] drawn at the asked temperature and top-p, and the model's confidence [N] in them if a ranking is asked for."""

    def transition(self, positions: Tensor, reveal: Reveal) -> tuple[Tensor, Tensor]:
        """One draw over the V tokens and the mask: tokens [N], and whether each was revealed [N]."""


@dataclass(frozen=True)
class Canvas:
    """The state of sampling."""

    ids: Tensor
    """[B, L] int64; arbitrary where masked."""
    is_masked: Tensor
    """[B, L] bool."""
    is_open: Tensor = None  # type: ignore[assignment]
    """[B, L] bool: positions that are to be written; all others are given and stay. What is masked at first, if not said."""

    def __post_init__(self) -> None:
        if self.is_open is None:
            object.__setattr__(self, "is_open", self.is_masked)

    def revealed(self, positions: Tensor, tokens: Tensor) -> Canvas:
        """The canvas with `tokens` at flat `positions`."""
        ids, is_masked = self.ids.flatten().clone(), self.is_masked.flatten().clone()
        ids[positions], is_masked[positions] = tokens, False
        return Canvas(ids.view_as(self.ids), is_masked.view_as(self.is_masked), self.is_open)

    def remasked(self, where: Tensor) -> Canvas:
        """The canvas with the positions of `where` [B, L] bool masked again."""
        return Canvas(self.ids, self.is_masked | where, self.is_open)


class Rule(Protocol):
    """One denoising step."""

    @property
    def is_timed(self) -> bool:
        """Whether t and s matter; otherwise a canvas is finished when nothing is masked, after as many steps as that takes."""

    @property
    def remasks(self) -> bool:
        """Whether a revealed token may be masked again, so that a canvas without masks is not finished before time 0."""

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """From time t to s < t; `uniform` [B, L] float64 in [0, 1) is the step's own randomness for choosing positions."""


class SelectionRule:
    """A rule that wants proposals somewhere and takes some of them. Times t, s are [B] float64: rows may be at different steps."""

    confidence: Ranking | None = None
    """What proposals are ranked by; None if the rule takes all that it wants."""
    is_timed: bool = True
    remasks: bool = False

    def wanted(self, canvas: Canvas, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """[B, L] bool: masked positions at which it wants proposals; a row without any needs no network call."""
        raise NotImplementedError

    def chosen(self, canvas: Canvas, wanted: Tensor, confidence: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """[B, L] bool: which of `wanted` are revealed, given the proposals' confidence [B, L] (-inf elsewhere)."""
        return wanted

    def remasked(self, canvas: Canvas, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """[B, L] bool: revealed positions that are masked again."""
        return torch.zeros_like(canvas.is_masked)

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """On the whole canvas; no network call if nothing is wanted."""
        now, then = (
            torch.full(canvas.ids.shape[:1], time, dtype=torch.float64, device=canvas.ids.device) for time in (t, s)
        )
        wanted = self.wanted(canvas, now, then, uniform)
        again = self.remasked(canvas, now, then, uniform) if self.remasks else None
        positions = wanted.flatten().nonzero()[:, 0]
        if len(positions):
            tokens, ranked = propose(positions, self.confidence)
            confidence = torch.full(wanted.shape, float("-inf"), dtype=torch.float64, device=wanted.device)
            if ranked is not None:
                confidence.view(-1)[positions] = ranked
            taken = self.chosen(canvas, wanted, confidence, now, then).flatten()[positions]
            canvas = canvas.revealed(positions[taken], tokens[taken])
        return canvas if again is None else canvas.remasked(again)


@dataclass(frozen=True)
class Ancestral(SelectionRule):
    """q(x_s | x_t, x_0 = prediction): every masked token is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t) (MD4, Eq. 2).

    With `joint`, coin and token are one draw over V + 1 outcomes, MD4's Algorithm 2: the same law in honest arithmetic, and another one
    with float32 Gumbel noise, which cannot draw outcomes below about 1e-8.

    With `remask` eta, a written token is masked again with probability sigma = min(eta, (1 - alpha_s) / alpha_t), and a masked one is revealed
    with (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), which leaves as many masked as before (ReMDM-cap, arXiv 2503.00307).
    """

    schedule: Schedule
    joint: bool = False
    remask: float = 0.0

    @property
    def remasks(self) -> bool:  # type: ignore[override]
        """Whether eta > 0."""
        return self.remask > 0

    def wanted(self, canvas: Canvas, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """Positions by coin."""
        kept = kept_share(self.schedule, t, s)
        if self.remasks:
            kept = kept - self._sigma(t, s) * self.schedule.alpha(t) / self.schedule.mask_probability(t)
        return canvas.is_masked & (uniform >= kept[:, None])

    def remasked(self, canvas: Canvas, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """Written positions by a coin of probability sigma."""
        return canvas.is_open & ~canvas.is_masked & (uniform < self._sigma(t, s)[:, None])

    def _sigma(self, t: Tensor, s: Tensor) -> Tensor:
        """[B]; 0 for s = 0."""
        highest = self.schedule.mask_probability(s) / self.schedule.alpha(t).abs()  # alpha(1) may be -0
        return torch.where(s > 0, highest.clamp(max=self.remask), 0.0)

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """Coins, then tokens; or both at once."""
        if not self.joint:
            return super().step(canvas, propose, t, s, uniform)
        kept = _kept_share(self.schedule, t, s)
        return _transition(canvas, propose, lambda probs, logits: (1 - kept) * probs)


@dataclass(frozen=True)
class StateDependent:
    """GenMD4: a masked token becomes v with probability (1 - (s/t)^{w_v}) mu_v; the larger w_v, the earlier v is revealed."""

    exponents: Tensor
    """[V] w."""
    is_timed = True
    remasks = False

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
    is_timed = True
    remasks = False

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """One draw over V + 1 outcomes at every masked position."""
        share = 1 - _kept_share(self.schedule, t, s)

        def reveal(probs: Tensor, logits: Tensor) -> Tensor:
            if s == 0:
                return probs
            return (share * log_normaliser(logits, self.vocab_size).exp()).clamp(max=1.0)[:, None] * probs

        return _transition(canvas, propose, reveal)


@dataclass(frozen=True)
class Confidence(SelectionRule):
    """Of each row, the proposals ranked highest are revealed, as many as the schedule expects (DiffuLLaMA, section 3.4).

    Ranked by probability, or by the `margin` between the two most probable tokens (top-k margin, arXiv 2502.06768).
    """

    schedule: Schedule
    confidence: Ranking = "probability"

    def _num_revealed(self, canvas: Canvas, s: Tensor) -> Tensor:
        """[B]: of its N open positions, a row keeps floor(N (1 - alpha_s)) masked; what rounding took from a whole number does not count."""
        share = torch.where(s > 0, self.schedule.mask_probability(s), 0.0)
        num_kept = (canvas.is_open.sum(1) * share + 1e-9).floor().long()
        return canvas.is_masked.sum(1) - num_kept

    def wanted(self, canvas: Canvas, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """Everything masked, in rows that are to reveal something."""
        return canvas.is_masked & (self._num_revealed(canvas, s) > 0)[:, None]

    def chosen(self, canvas: Canvas, wanted: Tensor, confidence: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The first of the ranking."""
        return wanted & (_rank(confidence) < self._num_revealed(canvas, s)[:, None])


@dataclass(frozen=True)
class LeftToRight(SelectionRule):
    """The first masked position of each row: how an autoregressive model writes."""

    is_timed = False

    def wanted(self, canvas: Canvas, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """One position a row."""
        return canvas.is_masked & (canvas.is_masked.cumsum(1) == 1)


@dataclass(frozen=True)
class FirstHitting(SelectionRule):
    """One uniformly chosen masked position of each row: the first-hitting sampler (BD3-LM, section 5.2; arXiv 2409.02908).

    The next token to be revealed is uniform among the masked ones whatever the schedule, and a network that is not told t does not ask when: the
    law of ancestral sampling in continuous time, with one token a call.
    """

    is_timed = False

    def wanted(self, canvas: Canvas, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """The masked position with the largest number."""
        largest = torch.where(canvas.is_masked, uniform, -1.0).argmax(1, keepdim=True)
        return canvas.is_masked & (torch.arange(uniform.shape[1], device=uniform.device) == largest)


class _Adaptive(SelectionRule):
    """How many are revealed depends on how sure the model is; at least one."""

    is_timed = False

    def wanted(self, canvas: Canvas, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """Everything masked."""
        return canvas.is_masked


@dataclass(frozen=True)
class Threshold(_Adaptive):
    """All proposals of a probability above tau, and at least the best (Fast-dLLM, arXiv 2505.22618, section 3.3)."""

    tau: float = 0.9
    confidence = "probability"

    def chosen(self, canvas: Canvas, wanted: Tensor, confidence: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """By log-probability."""
        least = math.log(self.tau) if self.tau > 0 else float("-inf")
        return wanted & ((confidence > least) | (_rank(confidence) == 0))


@dataclass(frozen=True)
class Factor(_Adaptive):
    """The n most probable proposals, for the largest n with (n + 1) (1 - p_(n)) < f, and at least one (Fast-dLLM, section 3.3).

    By its Theorem 1, f = 1 reveals in parallel only what greedy decoding would have revealed one by one.
    """

    f: float = 1.0
    confidence = "probability"

    def chosen(self, canvas: Canvas, wanted: Tensor, confidence: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """From the sorted log-probabilities."""
        ordered = confidence.sort(dim=1, descending=True).values
        n = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
        num_revealed = ((n * ((n + 1) * -torch.expm1(ordered) < self.f)).amax(1)).clamp(min=1)  # [B]
        return wanted & (_rank(confidence) < num_revealed[:, None])


@dataclass(frozen=True)
class EntropyBounded(_Adaptive):
    """The longest run of proposals of least entropy with sum H - max H <= gamma nats; at least one (EB-Sampler, arXiv 2505.24857).

    The left side bounds how much information the positions share that are drawn independently.
    """

    gamma: float = 0.1
    confidence = "entropy"

    def chosen(self, canvas: Canvas, wanted: Tensor, confidence: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """From the sorted entropies, whose last is the largest: the sum of those before it has to stay within gamma."""
        entropy = -confidence.sort(dim=1, descending=True).values
        before = torch.cat([torch.zeros_like(entropy[:, :1]), entropy[:, :-1].cumsum(1)], 1)
        return wanted & (_rank(confidence) < (before <= self.gamma).sum(1, keepdim=True))


def kept_share(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """(1 - alpha_s) / (1 - alpha_t) [B]: the probability of staying masked from t to s; 0 at s = 0, where a sampler has to end."""
    return torch.where(s > 0, schedule.mask_probability(s) / schedule.mask_probability(t), 0.0)


def _kept_share(schedule: Schedule, t: float, s: float) -> float:
    return float(kept_share(schedule, torch.tensor(t, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)))


def _rank(confidence: Tensor) -> Tensor:
    """[B, L] -> [B, L]: 0 for the highest of a row; of equal ones the first is higher."""
    return confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _transition(canvas: Canvas, propose: Propose, reveal: Reveal) -> Canvas:
    positions = canvas.is_masked.flatten().nonzero()[:, 0]
    if not len(positions):
        return canvas
    tokens, is_revealed = propose.transition(positions, reveal)
    return canvas.revealed(positions[is_revealed], tokens[is_revealed])
