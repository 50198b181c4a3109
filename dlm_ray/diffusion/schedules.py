"""alpha(t), the probability that a token is still clean at time t, and the weights that follow from it.

Every function takes t in (0, 1) of any shape and returns float tensors of that shape. The formulas are MD4's Table 4
(arXiv 2406.04329) and BD3-LM's appendix (arXiv 2503.09573). A schedule that runs from alpha(0) = 1 to alpha(1) = 0 has
a bound without reconstruction and prior terms; the geometric one and shifted ends have both (`reconstruction_nats`,
`prior_nats`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

NAMES = ("linear", "polynomial", "cosine", "cosine_alpha", "geometric", "log", "square", "square_root")


class Schedule(Protocol):
    """A schedule; a custom class (`objective.schedule.name: package.module:Class`) is created without arguments."""

    def alpha(self, t: Tensor) -> Tensor:
        """Return alpha(t), the probability that a token is clean."""

    def alpha_prime(self, t: Tensor) -> Tensor:
        """Return the derivative d alpha / dt, at most 0."""

    def mask_probability(self, t: Tensor) -> Tensor:
        """Return 1 - alpha(t), computed without cancellation near t = 0."""

    def weight(self, t: Tensor) -> Tensor:
        """Return -alpha'(t) / (1 - alpha(t)), at least 0: the ELBO's weight of a masked token's cross-entropy."""


@dataclass(frozen=True)
class Polynomial:
    """alpha(t) = 1 - t ** exponent: 1 is the linear schedule, 2 and 1/2 are BD3-LM's square and square root."""

    exponent: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """Return 1 - t ** w = -expm1(w ln t), which is accurate near t = 1."""
        return -torch.expm1(self.exponent * t.log())

    def alpha_prime(self, t: Tensor) -> Tensor:
        """Return the derivative -w t ** (w - 1)."""
        return -self.exponent * t ** (self.exponent - 1)

    def mask_probability(self, t: Tensor) -> Tensor:
        """Return the power t ** w."""
        return t**self.exponent

    def weight(self, t: Tensor) -> Tensor:
        """Return the ratio w / t."""
        return self.exponent / t


@dataclass(frozen=True)
class Cosine:
    """alpha(t) = 1 - cos(pi/2 (1 - t))."""

    def alpha(self, t: Tensor) -> Tensor:
        """Return 2 sin^2(pi/4 (1 - t)), an equal form that is accurate near t = 1."""
        return 2 * torch.sin(math.pi / 4 * (1 - t)) ** 2

    def alpha_prime(self, t: Tensor) -> Tensor:
        """Return the derivative -(pi / 2) cos(pi t / 2), as a sine of pi/2 (1 - t)."""
        return -(math.pi / 2) * torch.sin(math.pi / 2 * (1 - t))

    def mask_probability(self, t: Tensor) -> Tensor:
        """Return the sine sin(pi t / 2)."""
        return torch.sin(math.pi / 2 * t)

    def weight(self, t: Tensor) -> Tensor:
        """Return the weight (pi / 2) / tan(pi t / 2)."""
        return (math.pi / 2) * torch.sin(math.pi / 2 * (1 - t)) / torch.sin(math.pi / 2 * t)


@dataclass(frozen=True)
class CosineAlpha:
    """alpha(t) = cos(pi/2 t): BD3-LM's cosine (its Table 8), which keeps more tokens clean than MD4's (`Cosine`)."""

    def alpha(self, t: Tensor) -> Tensor:
        """Return sin(pi/2 (1 - t)), an equal form that is accurate near t = 1."""
        return torch.sin(math.pi / 2 * (1 - t))

    def alpha_prime(self, t: Tensor) -> Tensor:
        """Return the derivative -(pi / 2) sin(pi t / 2)."""
        return -(math.pi / 2) * torch.sin(math.pi / 2 * t)

    def mask_probability(self, t: Tensor) -> Tensor:
        """Return 2 sin^2(pi t / 4), which is 1 - cos(pi t / 2)."""
        return 2 * torch.sin(math.pi / 4 * t) ** 2

    def weight(self, t: Tensor) -> Tensor:
        """Return the weight (pi / 2) / tan(pi t / 4)."""
        return (math.pi / 2) / torch.tan(math.pi / 4 * t)


@dataclass(frozen=True)
class Geometric:
    """alpha(t) = exp(-B), B(t) = b_min^(1-t) b_max^t. MD4's Table 4 prints the weight with the wrong sign."""

    b_min: float = 1e-5
    b_max: float = 20.0

    def integrated_rate(self, t: Tensor) -> Tensor:
        """Return the integrated rate B(t)."""
        return torch.exp((1 - t) * math.log(self.b_min) + t * math.log(self.b_max))

    def alpha(self, t: Tensor) -> Tensor:
        """Return the exponential exp(-B)."""
        return torch.exp(-self.integrated_rate(t))

    def alpha_prime(self, t: Tensor) -> Tensor:
        """Return -B ln(b_max / b_min) exp(-B)."""
        rate = self.integrated_rate(t)
        return -rate * math.log(self.b_max / self.b_min) * torch.exp(-rate)

    def mask_probability(self, t: Tensor) -> Tensor:
        """Return -expm1(-B), which is 1 - exp(-B)."""
        return -torch.expm1(-self.integrated_rate(t))

    def weight(self, t: Tensor) -> Tensor:
        """Return ln(b_max / b_min) B / expm1(B)."""
        rate = self.integrated_rate(t)
        return math.log(self.b_max / self.b_min) * rate / torch.expm1(rate)


@dataclass(frozen=True)
class Logarithmic:
    """1 - alpha(t) = log2(1 + t) (BD3-LM's `log`)."""

    def alpha(self, t: Tensor) -> Tensor:
        """Return the logarithm -log2((1 + t) / 2)."""
        return -torch.log1p((t - 1) / 2) / math.log(2)

    def alpha_prime(self, t: Tensor) -> Tensor:
        """Return the derivative -1 / (ln 2 (1 + t))."""
        return -1 / (math.log(2) * (1 + t))

    def mask_probability(self, t: Tensor) -> Tensor:
        """Return the logarithm log2(1 + t)."""
        return torch.log1p(t) / math.log(2)

    def weight(self, t: Tensor) -> Tensor:
        """Return the weight 1 / ((1 + t) ln(1 + t))."""
        return 1 / ((1 + t) * torch.log1p(t))


@dataclass(frozen=True)
class Shifted:
    """(1 - e_0 - e_1) alpha + e_1: it starts at 1 - e_0 and ends at e_1 (MD4's code: 1e-4 each)."""

    schedule: Schedule
    epsilon_0: float
    epsilon_1: float

    @property
    def _scale(self) -> float:
        return 1 - self.epsilon_0 - self.epsilon_1

    def alpha(self, t: Tensor) -> Tensor:
        """Return (1 - e_0 - e_1) alpha + e_1."""
        return self._scale * self.schedule.alpha(t) + self.epsilon_1

    def alpha_prime(self, t: Tensor) -> Tensor:
        """Return (1 - e_0 - e_1) alpha'."""
        return self._scale * self.schedule.alpha_prime(t)

    def mask_probability(self, t: Tensor) -> Tensor:
        """Return (1 - e_0 - e_1) (1 - alpha) + e_0: a sum of positive terms."""
        return self._scale * self.schedule.mask_probability(t) + self.epsilon_0

    def weight(self, t: Tensor) -> Tensor:
        """Return -alpha' / (1 - alpha), finite at t = 0 if e_0 > 0."""
        return -self.alpha_prime(t) / self.mask_probability(t)


def build(
    name: str | type[Schedule], exponent: float | None = None, epsilon_0: float = 0.0, epsilon_1: float = 0.0
) -> Schedule:
    """Return the schedule of a recipe's `objective.schedule`.

    Args:
        name: one of NAMES, or a custom class, which is created without arguments.
        exponent: of `polynomial`.
        epsilon_0, epsilon_1: shifts of the ends, as in `Shifted`.

    Raises:
        ValueError: if `name` is not in NAMES.
    """
    schedules: dict[str, Schedule] = {
        "linear": Polynomial(1.0),
        "polynomial": Polynomial(exponent or 1.0),
        "cosine": Cosine(),
        "cosine_alpha": CosineAlpha(),
        "geometric": Geometric(),
        "log": Logarithmic(),
        "square": Polynomial(2.0),
        "square_root": Polynomial(0.5),
    }
    if not isinstance(name, str):
        schedule = name()
    elif name in schedules:
        assert name != "polynomial" or exponent is not None, "a polynomial schedule needs its exponent"
        schedule = schedules[name]
    else:
        raise ValueError(f"objective.schedule.name={name!r}; allowed are {', '.join(NAMES)}")
    return Shifted(schedule, epsilon_0, epsilon_1) if epsilon_0 or epsilon_1 else schedule


def at(function: object, time: float) -> float:
    """Return the value of a schedule's method at one time, in float64."""
    assert callable(function), "a schedule's method"
    return float(function(torch.tensor(time, dtype=torch.float64)))


def reconstruction_nats(schedule: Schedule, vocab_size: int, t: float = 0.0) -> float:
    """Return (1 - alpha(t)) ln V nats per token: -log p(x_0 | x_t) for p proportional to q(x_t | x_0) (MD4, sec. 3)."""
    return at(schedule.mask_probability, t) * math.log(vocab_size)


def prior_nats(schedule: Schedule, vocab_size: int) -> float:
    """Return alpha(1) ln V nats per token: KL(q(x_1 | x_0) || p(x_1)).

    p(x_1) is uniform over the tokens with mass alpha(1), and the mask otherwise.
    """
    return max(0.0, at(schedule.alpha, 1.0)) * math.log(vocab_size)
