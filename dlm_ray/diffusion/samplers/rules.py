"""Rules for one denoising step: a rule takes a canvas from time t to an earlier time s.

A rule requests tokens only at the positions that it needs, so that no other logits are computed. Most rules are a
`SelectionRule`: they return where they want proposals, then which of the proposals they reveal, and therefore work on a
whole canvas and in blocks over a cache. The other rules sample token and coin together, on a whole canvas only.
Positions are flat indices into the canvas [B, L].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dlm_ray.diffusion.objectives.sedd import log_normaliser
from dlm_ray.diffusion.samplers.token_sampling import Ranking
from dlm_ray.diffusion.schedules import Schedule

Reveal = Callable[[Tensor, Tensor], Tensor]
"""(probs [n, V] at the requested temperature and top-p, logits [n, V] of the network) -> [n, V] probability of becoming
each token. A row sums to at most 1; the rest is the probability of staying masked."""


class Propose(Protocol):
    """The proposals that a rule can request, at flat positions [N] of the canvas."""

    def __call__(self, positions: Tensor, confidence: Ranking | None) -> tuple[Tensor, Tensor | None]:
        """Return tokens [N] sampled at the requested temperature and top-p, and the model's confidence [N] in them."""

    def transition(self, positions: Tensor, reveal: Reveal) -> tuple[Tensor, Tensor]:
        """Sample among the V tokens and the mask; return tokens [N] and whether each was revealed [N]."""


@dataclass(frozen=True)
class Canvas:
    """The tokens of a batch of partly masked sequences."""

    ids: Tensor
    """[B, L] int64 token ids; arbitrary where masked."""
    is_masked: Tensor
    """[B, L] bool: positions that are masked."""
    is_open: Tensor = None  # type: ignore[assignment]
    """[B, L] bool: positions to generate; all others are given and stay. Default: `is_masked`."""

    def __post_init__(self) -> None:
        if self.is_open is None:
            object.__setattr__(self, "is_open", self.is_masked)

    def revealed(self, positions: Tensor, tokens: Tensor) -> Canvas:
        """Return the canvas with `tokens` at flat `positions`."""
        ids, is_masked = self.ids.flatten().clone(), self.is_masked.flatten().clone()
        ids[positions], is_masked[positions] = tokens, False
        return Canvas(ids.view_as(self.ids), is_masked.view_as(self.is_masked), self.is_open)

    def remasked(self, where: Tensor) -> Canvas:
        """Return the canvas with the positions of `where` [B, L] bool masked again."""
        return Canvas(self.ids, self.is_masked | where, self.is_open)


class Rule(Protocol):
    """The interface of a denoising step."""

    @property
    def is_timed(self) -> bool:
        """Whether the rule uses t and s; if not, a canvas is finished as soon as no position is masked."""

    @property
    def remasks(self) -> bool:
        """Whether a revealed token may be masked again, so that a canvas is not finished before time 0."""

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """Take the canvas from time t to s < t.

        `uniform` [B, L] float64 in [0, 1) are the random numbers that select positions.
        """


class SelectionRule:
    """A rule that wants proposals at some positions and reveals some of them.

    Times t, s are [B] float64: rows may be at different steps.
    """

    confidence: Ranking | None = None
    """The confidence that ranks proposals; None if the rule reveals all positions that it wants."""
    is_timed: bool = True
    remasks: bool = False

    def wanted(self, canvas: Canvas, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """Return the masked positions [B, L] bool that need proposals; a row without any needs no network call."""
        raise NotImplementedError

    def selected(self, canvas: Canvas, wanted: Tensor, confidence: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return which of `wanted` to reveal [B, L] bool, given the proposals' confidence [B, L], -inf elsewhere."""
        return wanted

    def remasked(self, canvas: Canvas, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """Return the revealed positions [B, L] bool to mask again."""
        return torch.zeros_like(canvas.is_masked)

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """Take one step on a whole canvas; without wanted positions there is no network call."""
        now, then = (
            torch.full(canvas.ids.shape[:1], time, dtype=torch.float64, device=canvas.ids.device) for time in (t, s)
        )
        wanted = self.wanted(canvas, now, then, uniform)
        remasked = self.remasked(canvas, now, then, uniform) if self.remasks else None
        positions = wanted.flatten().nonzero()[:, 0]
        if len(positions):
            tokens, ranked = propose(positions, self.confidence)
            confidence = torch.full(wanted.shape, float("-inf"), dtype=torch.float64, device=wanted.device)
            if ranked is not None:
                confidence.view(-1)[positions] = ranked
            selected = self.selected(canvas, wanted, confidence, now, then).flatten()[positions]
            canvas = canvas.revealed(positions[selected], tokens[selected])
        return canvas if remasked is None else canvas.remasked(remasked)


@dataclass(frozen=True)
class Ancestral(SelectionRule):
    """Ancestral sampling from q(x_s | x_t, x_0 = prediction) (MD4, Eq. 2).

    Every masked token is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t).

    With `joint`, coin and token are sampled together among V + 1 outcomes, as in MD4's Algorithm 2. In exact arithmetic
    the distribution is the same; with float32 Gumbel noise it differs, because outcomes below about 1e-8 never occur.

    With `remask` eta, a revealed token is masked again with probability sigma = min(eta, (1 - alpha_s) / alpha_t), and
    a masked one is revealed with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t). The expected number of
    masked tokens stays the same (ReMDM-cap, arXiv 2503.00307).
    """

    schedule: Schedule
    joint: bool = False
    remask: float = 0.0

    @property
    def remasks(self) -> bool:  # type: ignore[override]
        """Whether eta is greater than 0."""
        return self.remask > 0

    def wanted(self, canvas: Canvas, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """Return masked positions, each with the probability of being revealed."""
        kept = kept_share(self.schedule, t, s)
        if self.remasks:
            kept = kept - self._sigma(t, s) * self.schedule.alpha(t) / self.schedule.mask_probability(t)
        return canvas.is_masked & (uniform >= kept[:, None])

    def remasked(self, canvas: Canvas, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """Return revealed positions, each with probability sigma."""
        return canvas.is_open & ~canvas.is_masked & (uniform < self._sigma(t, s)[:, None])

    def _sigma(self, t: Tensor, s: Tensor) -> Tensor:
        """Return sigma [B], which is 0 for s = 0."""
        highest = self.schedule.mask_probability(s) / self.schedule.alpha(t).abs()  # alpha(1) may be -0.0
        return torch.where(s > 0, highest.clamp(max=self.remask), 0.0)

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """Select positions and then sample tokens, or with `joint` do both at once."""
        if not self.joint:
            return super().step(canvas, propose, t, s, uniform)
        kept = _kept_share(self.schedule, t, s)
        return _transition(canvas, propose, lambda probs, logits: (1 - kept) * probs)


@dataclass(frozen=True)
class StateDependent:
    """GenMD4's step: a masked token becomes v with probability (1 - (s/t)^{w_v}) mu_v.

    The larger w_v is, the earlier v is revealed.
    """

    exponents: Tensor
    """[V] exponents w of the tokens."""
    is_timed = True
    remasks = False

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """Sample among V + 1 outcomes at every masked position."""
        becomes = 1 - (s / t) ** self.exponents.double()
        return _transition(canvas, propose, lambda probs, logits: becomes * probs)


@dataclass(frozen=True)
class Tweedie:
    """SEDD's analytic step: a masked token becomes v with probability s_v (e^D - 1), D = ln(alpha_s / alpha_t).

    With s_v = r Z mu_v this is Z (alpha_s - alpha_t) / (1 - alpha_t) mu_v: MD4's step times the network's Z, clamped
    to 1. The last step drops the mask and normalises, as SEDD's final denoising does.
    """

    schedule: Schedule
    vocab_size: int
    is_timed = True
    remasks = False

    def step(self, canvas: Canvas, propose: Propose, t: float, s: float, uniform: Tensor) -> Canvas:
        """Sample among V + 1 outcomes at every masked position."""
        share = 1 - _kept_share(self.schedule, t, s)

        def reveal(probs: Tensor, logits: Tensor) -> Tensor:
            if s == 0:
                return probs
            return (share * log_normaliser(logits, self.vocab_size).exp()).clamp(max=1.0)[:, None] * probs

        return _transition(canvas, propose, reveal)


@dataclass(frozen=True)
class Confidence(SelectionRule):
    """Reveals the highest-ranked proposals of each row, as many as the schedule expects (DiffuLLaMA, section 3.4).

    Proposals are ranked by probability, or by the `margin` between the two most probable tokens (top-k margin,
    arXiv 2502.06768).
    """

    schedule: Schedule
    confidence: Ranking = "probability"

    def _num_revealed(self, canvas: Canvas, s: Tensor) -> Tensor:
        """Return the number of positions to reveal [B]: of N open positions, floor(N (1 - alpha_s)) stay masked.

        The small constant undoes rounding errors just below a whole number.
        """
        share = torch.where(s > 0, self.schedule.mask_probability(s), 0.0)
        num_kept = (canvas.is_open.sum(1) * share + 1e-9).floor().long()
        return canvas.is_masked.sum(1) - num_kept

    def wanted(self, canvas: Canvas, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """Return all masked positions of the rows that reveal at least one."""
        return canvas.is_masked & (self._num_revealed(canvas, s) > 0)[:, None]

    def selected(self, canvas: Canvas, wanted: Tensor, confidence: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the highest-ranked positions."""
        return wanted & (_rank(confidence) < self._num_revealed(canvas, s)[:, None])


@dataclass(frozen=True)
class LeftToRight(SelectionRule):
    """Reveals the first masked position of each row, as an autoregressive model does."""

    is_timed = False

    def wanted(self, canvas: Canvas, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """Return the first masked position of each row."""
        return canvas.is_masked & (canvas.is_masked.cumsum(1) == 1)


@dataclass(frozen=True)
class FirstHitting(SelectionRule):
    """Reveals one uniformly random masked position per row: the first-hitting sampler.

    With any schedule, the next token to be revealed is uniform among the masked ones, and a network that does not take
    t as input does not depend on the time. The distribution is therefore that of ancestral sampling in continuous time,
    with one token per call (BD3-LM, section 5.2; arXiv 2409.02908).
    """

    is_timed = False

    def wanted(self, canvas: Canvas, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """Return the masked position with the largest random number."""
        largest = torch.where(canvas.is_masked, uniform, -1.0).argmax(1, keepdim=True)
        return canvas.is_masked & (torch.arange(uniform.shape[1], device=uniform.device) == largest)


class _Adaptive(SelectionRule):
    """A rule that reveals a number of positions that depends on the model's confidence, and at least one."""

    is_timed = False

    def wanted(self, canvas: Canvas, t: Tensor, s: Tensor, uniform: Tensor) -> Tensor:
        """Return all masked positions."""
        return canvas.is_masked


@dataclass(frozen=True)
class Threshold(_Adaptive):
    """Reveals all proposals with a probability above `threshold`, and at least the best.

    Fast-dLLM, arXiv 2505.22618, section 3.3.
    """

    threshold: float
    """tau of the paper."""
    confidence = "probability"

    def selected(self, canvas: Canvas, wanted: Tensor, confidence: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the positions whose log-probability is above that of the threshold, and the best."""
        lowest = math.log(self.threshold) if self.threshold > 0 else float("-inf")
        return wanted & ((confidence > lowest) | (_rank(confidence) == 0))


@dataclass(frozen=True)
class Factor(_Adaptive):
    """Reveals the n most probable proposals, for the largest n with (n + 1) (1 - p_(n)) < f, and at least one.

    By Theorem 1 of Fast-dLLM (section 3.3), f = 1 reveals in parallel only tokens that greedy decoding would reveal one
    by one.
    """

    factor: float
    """f of the paper."""
    confidence = "probability"

    def selected(self, canvas: Canvas, wanted: Tensor, confidence: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the n most probable positions."""
        ordered = confidence.sort(dim=1, descending=True).values
        n = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
        num_revealed = ((n * ((n + 1) * -torch.expm1(ordered) < self.factor)).amax(1)).clamp(min=1)  # [B]
        return wanted & (_rank(confidence) < num_revealed[:, None])


@dataclass(frozen=True)
class EntropyBounded(_Adaptive):
    """Reveals the most proposals of lowest entropy with sum H - max H <= `entropy_bound` nats, and at least one.

    The left side bounds the mutual information of the positions, which are sampled independently (EB-Sampler,
    arXiv 2505.24857).
    """

    entropy_bound: float
    """gamma of the paper, in nats."""
    confidence = "entropy"

    def selected(self, canvas: Canvas, wanted: Tensor, confidence: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the positions of lowest entropy: without the largest, they sum to at most the bound."""
        entropy = -confidence.sort(dim=1, descending=True).values
        before = torch.cat([torch.zeros_like(entropy[:, :1]), entropy[:, :-1].cumsum(1)], 1)
        return wanted & (_rank(confidence) < (before <= self.entropy_bound).sum(1, keepdim=True))


def kept_share(schedule: Schedule, t: Tensor, s: Tensor) -> Tensor:
    """Return the probability [B] of staying masked from t to s, (1 - alpha_s) / (1 - alpha_t).

    It is 0 at s = 0, where every position has to be revealed.
    """
    return torch.where(s > 0, schedule.mask_probability(s) / schedule.mask_probability(t), 0.0)


def _kept_share(schedule: Schedule, t: float, s: float) -> float:
    return float(kept_share(schedule, torch.tensor(t, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)))


def _rank(confidence: Tensor) -> Tensor:
    """Return the rank [B, L] of each value in its row: 0 for the highest; of equal values the first ranks higher."""
    return confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _transition(canvas: Canvas, propose: Propose, reveal: Reveal) -> Canvas:
    positions = canvas.is_masked.flatten().nonzero()[:, 0]
    if not len(positions):
        return canvas
    tokens, is_revealed = propose.transition(positions, reveal)
    return canvas.revealed(positions[is_revealed], tokens[is_revealed])
