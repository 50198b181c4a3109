"""The trials of a sweep in order: who is best, and who cannot be told from the best by the paired interval."""

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
    """One trial with what was measured of it."""

    number: int
    settings: Mapping[str, Any]
    status: str
    """finished, stopped, failed."""
    reason: str
    step: int
    run_dir: str
    clones: Sequence[Mapping[str, Any]]
    curve: Sequence[tuple[float, float]]
    """(tokens, bits per byte) of the validation in the loop."""
    measured: Mapping[str, Any]
    """Of `sweep_measure.measure`; empty if there is no checkpoint."""

    @property
    def name(self) -> str:
        """For people."""
        return spaces.label(dict(self.settings)) or f"trial {self.number}"

    def group(self, key: str | None) -> str:
        """The value of `key`, among whose trials this one is compared."""
        return "" if key is None else case_name(self.settings.get(key))


@dataclass(frozen=True)
class Ranked:
    """A trial beside the best of its group."""

    row: TrialResult
    place: int | None
    """From 1; None for what was stopped or failed: it saw fewer tokens."""
    difference: float | None
    """Its metric less the best's."""
    low: float | None
    high: float | None
    """95 %, paired: over documents (bits_per_byte; None if there is one document) or over common draws (nelbo_variance); None where neither pairs."""

    @property
    def is_tied(self) -> bool | None:
        """Whether it cannot be told from the best: its interval covers 0. None where there is no interval, so that it cannot be said.

        The best is the smallest value, and says who is tied with it.
        """
        if self.place is None or self.place == 1:
            return False
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high


def ranked(rows: Sequence[TrialResult], metric: str, rank_by: str | None) -> list[Ranked]:
    """All trials: group by group, the best first, then what was stopped or came out as no number, then what failed."""
    found = []
    for group in dict.fromkeys(row.group(rank_by) for row in rows):
        own = [row for row in rows if row.group(rank_by) == group]
        ranking = [row for row in own if row.status == "finished" and is_number(row.measured.get(metric))]
        ranking.sort(key=lambda row: row.measured[metric], reverse=METRICS[metric] == "max")
        for place, row in enumerate(ranking, 1):
            found.append(Ranked(row, place, *_difference(row, ranking[0], metric)))
        rest = [row for row in own if row not in ranking]
        found += [
            Ranked(row, None, None, None, None)
            for row in sorted(rest, key=lambda row: (row.status == "failed", row.number))
        ]
    return found


def is_number(value: float | None) -> bool:
    """Whether a trial was measured, and came out with something that has a place in an order."""
    return value is not None and math.isfinite(value)


def best(found: Sequence[Ranked]) -> list[TrialResult]:
    """The first of every group."""
    return [one.row for one in found if one.place == 1]


def _difference(row: TrialResult, first: TrialResult, metric: str) -> tuple[float, float | None, float | None]:
    own, other = row.measured, first.measured
    difference = own[metric] - other[metric]
    if metric == "bits_per_byte" and own["bytes"] == other["bytes"]:
        nats, num_bytes = np.subtract(own["nats"], other["nats"]), np.array(own["bytes"])
        return bits_per_byte(float(nats.sum()), float(num_bytes.sum())), *(
            documents_interval(nats, num_bytes) or (None, None)
        )
    if metric == "nelbo_variance":
        return t_interval(np.subtract(own["variances"], other["variances"]).tolist())
    return difference, None, None
