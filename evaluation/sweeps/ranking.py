"""The ranking of a sweep's trials: the best, and those whose paired interval does not distinguish them from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from dlm_ray.evaluation.studies.statistics import t_interval

from dlm_ray.config import space as spaces
from dlm_ray.config.sweep_checks import METRICS, case_name
from dlm_ray.diffusion.likelihood import bits_per_byte, documents_interval


@dataclass(frozen=True)
class TrialResult:
    """A trial and its measurements."""

    number: int
    settings: Mapping[str, Any]
    """The values that the sweep gave the keys of its space."""
    status: str
    """finished, stopped or failed."""
    reason: str
    """Why the trial was stopped or failed."""
    step: int
    run_dir: str
    clones: Sequence[Mapping[str, Any]]
    """The trials that it continued as a copy of (pbt): `from`, `step` and `settings`."""
    curve: Sequence[tuple[float, float]]
    """(tokens, bits per byte) of the validation during training."""
    measured: Mapping[str, Any]
    """The result of `measure.measure`; empty if the trial has no checkpoint."""

    @property
    def name(self) -> str:
        """The settings as a label for readers, or the number of the trial."""
        return spaces.label(dict(self.settings)) or f"trial {self.number}"

    def group(self, key: str | None) -> str:
        """Return the value of `key`; trials are compared with those of the same value."""
        return "" if key is None else case_name(self.settings.get(key))


@dataclass(frozen=True)
class Ranked:
    """A trial compared with the best of its group."""

    trial: TrialResult
    place: int | None = None
    """From 1; None for a stopped or failed trial, which saw fewer tokens, and for one whose metric is not finite."""
    difference: float | None = None
    """The trial's metric minus the best's."""
    low: float | None = None
    high: float | None = None
    """The paired 95 % interval of the difference.

    It is over documents for bits_per_byte and over common draws for nelbo_variance. None if there is a single document,
    or the metric has no pairs.
    """

    @property
    def is_tied(self) -> bool | None:
        """Whether the interval covers 0, so that the trial cannot be distinguished from the best.

        None without an interval. The best trial itself has the best value and is not called tied.
        """
        if self.place is None or self.place == 1:
            return False
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high


def ranked(trials: Sequence[TrialResult], metric: str, rank_by: str | None) -> list[Ranked]:
    """Rank the trials of each group, the best first, followed by those without a place, failed trials last.

    Args:
        trials: the trials of a sweep.
        metric: a key of METRICS.
        rank_by: the key of the space whose value defines the groups; one group if None.
    """
    result = []
    for group in dict.fromkeys(trial.group(rank_by) for trial in trials):
        members = [trial for trial in trials if trial.group(rank_by) == group]
        placed = [trial for trial in members if trial.status == "finished" and is_number(trial.measured.get(metric))]
        placed.sort(key=lambda trial: trial.measured[metric], reverse=METRICS[metric] == "max")
        for place, trial in enumerate(placed, 1):
            result.append(Ranked(trial, place, *_difference(trial, placed[0], metric)))
        others = [trial for trial in members if trial not in placed]
        others.sort(key=lambda trial: (trial.status == "failed", trial.number))
        result += [Ranked(trial) for trial in others]
    return result


def is_number(value: float | None) -> bool:
    """Return whether a metric was measured and is finite, so that it can be ranked."""
    return value is not None and math.isfinite(value)


def best(ranking: Sequence[Ranked]) -> list[TrialResult]:
    """Return the best trial of every group."""
    return [entry.trial for entry in ranking if entry.place == 1]


def _difference(trial: TrialResult, first: TrialResult, metric: str) -> tuple[float, float | None, float | None]:
    """Return the difference of a trial's metric to the best's, and its paired 95 % interval if there is one."""
    measured, reference = trial.measured, first.measured
    if metric == "bits_per_byte" and measured["bytes"] == reference["bytes"]:
        nats, num_bytes = np.subtract(measured["nats"], reference["nats"]), np.array(measured["bytes"])
        low, high = documents_interval(nats, num_bytes) or (None, None)
        return bits_per_byte(float(nats.sum()), float(num_bytes.sum())), low, high
    if metric == "nelbo_variance":
        return t_interval(np.subtract(measured["variances"], reference["variances"]).tolist())
    return measured[metric] - reference[metric], None, None
