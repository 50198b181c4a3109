"""Statistics of few paired numbers: t and sign-flip tests, Holm's correction, and the minimum detectable effect."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

NUM_FLIPS = 20_000
NUM_RESAMPLES = 4_000
_MOST_EXACT_PAIRS = 12  # all 2^12 flips of signs are enumerated
_FLIPS_AT_ONCE = 500  # all 20,000 flips of a thousand documents would take half a gigabyte
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


def t_tail(t: float, dof: int) -> float:
    """Return P(|T| > |t|) for Student's t.

    With T = sqrt(dof) tan(angle), the density of the angle is proportional to cos(angle)^(dof - 1).
    """

    def area(low: float, high: float) -> float:
        angles = (low + high) / 2 + (high - low) / 2 * _NODES
        return float((high - low) / 2 * (_WEIGHTS * np.cos(angles) ** (dof - 1)).sum())

    angle = math.atan(abs(t) / math.sqrt(dof))
    return area(angle, math.pi / 2) / area(0.0, math.pi / 2)


def t_quantile(p: float, dof: int) -> float:
    """Return the t with P(T <= t) = p, for 0.5 < p < 1."""
    low, high = 0.0, 1.0
    while t_tail(high, dof) > 2 * (1 - p):
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, dof) > 2 * (1 - p) else (low, middle)
    return high


def t_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return the mean and its 95 % interval by Student's t; a single value has no interval."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    half = t_quantile(0.975, len(values) - 1) * _deviation(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def t_test_p(differences: Sequence[float]) -> float | None:
    """Return the two-sided p value of a paired t test; None for a single pair."""
    if len(differences) < 2:
        return None
    error, mean = _deviation(differences) / math.sqrt(len(differences)), float(np.mean(differences))
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return t_tail(mean / error, len(differences) - 1)


def sign_flip_p(differences: Sequence[float], seed: int = 0) -> float:
    """Return the two-sided p value of the mean under random flips of signs.

    It is exact for up to 12 pairs and a Monte Carlo estimate for more. The smallest p of n pairs is 2^(1 - n).
    """
    values = np.asarray(differences, dtype=np.float64)
    observed = abs(values.sum()) * (1 - 1e-12)
    if len(values) <= _MOST_EXACT_PAIRS:
        signs = np.array(list(itertools.product([1, -1], repeat=len(values))))
        return float((np.abs(signs @ values) >= observed).mean())
    random, num_reached = np.random.default_rng(seed), 0
    for _ in range(NUM_FLIPS // _FLIPS_AT_ONCE):
        signs = 2 * random.integers(0, 2, size=(_FLIPS_AT_ONCE, len(values)), dtype=np.int8) - 1
        num_reached += int((np.abs(signs @ values) >= observed).sum())
    return (1 + num_reached) / (1 + NUM_FLIPS)


def bootstrap_interval(
    differences: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95 % interval of sum(differences) / sum(weights) over resampled pairs.

    Without weights, it is the interval of the mean. None if fewer than two pairs have a weight.
    """
    values = np.asarray(differences, dtype=np.float64)
    sizes = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    if np.count_nonzero(sizes) < 2:
        return None
    uniform = np.full(len(values), 1 / len(values))
    counts = np.random.default_rng(seed).multinomial(len(values), uniform, size=NUM_RESAMPLES)
    totals = counts @ sizes
    has_weight = totals > 0
    low, high = np.quantile((counts @ values)[has_weight] / totals[has_weight], [0.025, 0.975])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted by Holm's method, in the given order.

    The k-th smallest is multiplied by n - k + 1; it is at least the adjusted value before it, and at most 1.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def minimum_detectable_effect(differences: Sequence[float], power: float = 0.8, alpha: float = 0.05) -> float | None:
    """Return the mean difference that a paired two-sided t test detects with this power; None for a single pair.

    n and the standard deviation are those of `differences`. The computation uses the noncentral t: the usual
    (t_{1 - alpha/2} + t_power) s / sqrt(n) has a power of 0.73 instead of 0.8 at n = 2, and of 0.77 at n = 3.
    """
    n = len(differences)
    if n < 2:
        return None
    critical = t_quantile(1 - alpha / 2, n - 1)
    low, high = 0.0, 1.0
    while _power(high, critical, n - 1) < power:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _power(middle, critical, n - 1) < power else (low, middle)
    return high * _deviation(differences) / math.sqrt(n)


def _deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of the population that at least two values are sampled from."""
    return float(np.std(values, ddof=1))


def _power(shift: float, critical: float, dof: int) -> float:
    """Return the power of a t test against a mean of `shift` standard errors.

    It is P(|Z + shift| > critical S) for a standard normal Z and an S with dof S^2 chi-square distributed.
    """
    reach = 10 / math.sqrt(2 * dof)
    low, high = max(0.0, 1 - reach), 1 + reach
    spreads = (low + high) / 2 + (high - low) / 2 * _NODES
    logs = (dof - 1) * np.log(spreads) - dof * spreads**2 / 2
    density = _WEIGHTS * np.exp(logs - logs.max())
    rejections = [
        math.erfc((critical * s - shift) / math.sqrt(2)) / 2 + math.erfc((critical * s + shift) / math.sqrt(2)) / 2
        for s in spreads
    ]
    return float(density @ rejections / density.sum())
