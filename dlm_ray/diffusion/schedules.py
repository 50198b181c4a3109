"""alpha(t), the probability that a token is still clean at time t, and what the objectives and samplers derive from it.

Every function takes t in (0, 1] of any shape and returns float tensors of that shape. All schedules run from alpha(0) = 1 to
alpha(1) = 0, so that the continuous-time bound has neither a reconstruction nor a prior term (MD4, arXiv 2406.04329, Eq. 5 and
Table 4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """What a schedule answers; `mask_probability` is 1 - alpha(t), computed without cancellation near t = 0."""

    def alpha(self, t: Tensor) -> Tensor:
        """alpha(t)."""

    def alpha_prime(self, t: Tensor) -> Tensor:
        """D alpha / dt, at most 0."""

    def mask_probability(self, t: Tensor) -> Tensor:
        """1 - alpha(t)."""

    def weight(self, t: Tensor) -> Tensor:
        """-alpha'(t) / (1 - alpha(t)), at least 0: the ELBO's weight of a masked token's cross-entropy."""


@dataclass(frozen=True)
class Polynomial:
    """alpha(t) = 1 - t ** exponent; the linear schedule is exponent 1."""

    exponent: float = 1.0

    def alpha(self, t: Tensor) -> Tensor:
        """1 - t ** w."""
        return 1 - t**self.exponent

    def alpha_prime(self, t: Tensor) -> Tensor:
        """-w t ** (w - 1)."""
        return -self.exponent * t ** (self.exponent - 1)

    def mask_probability(self, t: Tensor) -> Tensor:
        """T ** w."""
        return t**self.exponent

    def weight(self, t: Tensor) -> Tensor:
        """W / t."""
        return self.exponent / t


@dataclass(frozen=True)
class Cosine:
    """alpha(t) = 1 - cos(pi/2 (1 - t))."""

    def alpha(self, t: Tensor) -> Tensor:
        """1 - sin(pi t / 2), which is the same."""
        return 1 - torch.sin(math.pi / 2 * t)

    def alpha_prime(self, t: Tensor) -> Tensor:
        """-(pi / 2) cos(pi t / 2)."""
        return -(math.pi / 2) * torch.cos(math.pi / 2 * t)

    def mask_probability(self, t: Tensor) -> Tensor:
        """sin(pi t / 2)."""
        return torch.sin(math.pi / 2 * t)

    def weight(self, t: Tensor) -> Tensor:
        """(pi / 2) / tan(pi t / 2)."""
        return (math.pi / 2) / torch.tan(math.pi / 2 * t)


def build(name: str, exponent: float | None = None) -> Schedule:
    """The schedule of a recipe's `objective.schedule`.

    Raises:
        ValueError: for a name that is not linear, polynomial or cosine.
    """
    if name == "linear":
        return Polynomial(1.0)
    if name == "polynomial":
        assert exponent is not None, "a polynomial schedule needs its exponent"
        return Polynomial(exponent)
    if name == "cosine":
        return Cosine()
    raise ValueError(f"objective.schedule.name={name!r}; allowed are linear, polynomial, cosine")
