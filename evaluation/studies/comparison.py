"""Comparisons of a study's arms with its baseline, and verdicts on published orderings.

Two questions are answered separately: would other training seeds give the same result (pairs of runs with one seed),
and would other documents (pairs of documents, given these trained models)? Holm's correction applies within each
question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from dlm_ray.evaluation.studies import statistics
from dlm_ray.evaluation.studies.runner import Record, Study


@dataclass(frozen=True)
class Comparison:
    """The difference of an arm to the baseline, arm minus baseline."""

    arm: str
    over: Literal["training seeds", "documents"]
    """What the pairs are."""
    n: int
    """The number of pairs."""
    difference: float
    low: float | None
    high: float | None
    """The 95 % interval of the difference; None with a single pair."""
    p: float | None
    p_holm: float | None = None
    """p after Holm's correction."""
    smallest_visible: float | None = None
    """The minimum detectable effect: the difference that is detected with power 0.8 at this n and spread."""


@dataclass(frozen=True)
class Verdict:
    """The result for a published ordering of two arms."""

    better: str
    worse: str
    source: str
    """Where it is claimed."""
    difference: float | None
    """The mean over seeds of better minus worse; negative if it agrees with the claim."""
    low: float | None
    high: float | None
    verdict: str


def compare(study: Study, records: Sequence[Record]) -> list[Comparison]:
    """Compare every arm with the baseline, over training seeds and over documents, Holm-corrected within each.

    Over seeds, p is of a t test: with three pairs, sign flips cannot give a p below 0.25.
    """
    runs = {arm.name: _comparable_runs(study, records, arm.name) for arm in study.arms}
    baseline = runs.pop(study.baseline)
    comparisons = []
    for name, by_seed in runs.items():
        pairs = [(by_seed[seed], baseline[seed]) for seed in sorted(by_seed.keys() & baseline.keys())]
        if not pairs:
            continue
        comparisons.append(_over_seeds(study, name, pairs))
        scored = [(run, base) for run, base in pairs if run.documents is not None and base.documents is not None]
        if scored:
            comparisons.append(_over_documents(name, scored))
    for over in ("training seeds", "documents"):
        tested = [i for i, one in enumerate(comparisons) if one.over == over and one.p is not None]
        for i, p_holm in zip(tested, statistics.holm([comparisons[i].p or 0.0 for i in tested]), strict=True):
            comparisons[i] = replace(comparisons[i], p_holm=p_holm)
    return comparisons


def judge_orderings(study: Study, records: Sequence[Record]) -> list[Verdict]:
    """Return a verdict for every published ordering.

    It "held" or is "reversed" if the 95 % interval over training seeds excludes 0, and is not resolved otherwise.
    """
    verdicts = []
    for better, worse, source in study.orderings:
        runs, others = (_comparable_runs(study, records, arm) for arm in (better, worse))
        seeds = sorted(runs.keys() & others.keys())
        if not seeds:
            verdicts.append(Verdict(better, worse, source, None, None, None, "not comparable"))
            continue
        mean, low, high = statistics.t_interval([_value(study, runs[s]) - _value(study, others[s]) for s in seeds])
        verdict = "not resolved at this size"
        if low is not None and high is not None and (high < 0 or low > 0):
            verdict = "held" if high < 0 else "reversed"
        verdicts.append(Verdict(better, worse, source, mean, low, high, verdict))
    return verdicts


def _over_seeds(study: Study, name: str, pairs: Sequence[tuple[Record, Record]]) -> Comparison:
    """Compare pairs of runs with the same training seed."""
    differences = [_value(study, run) - _value(study, base) for run, base in pairs]
    mean, low, high = statistics.t_interval(differences)
    return Comparison(
        name,
        "training seeds",
        len(differences),
        mean,
        low,
        high,
        statistics.t_test_p(differences),
        smallest_visible=statistics.minimum_detectable_effect(differences),
    )


def _over_documents(name: str, pairs: Sequence[tuple[Record, Record]]) -> Comparison:
    """Compare pairs of documents, with the differences averaged over seeds.

    The total difference is divided by the total weight, which keeps the unit of the metric.
    """
    per_seed = [np.asarray(run.documents, float) - np.asarray(base.documents, float) for run, base in pairs]
    differences = np.mean(per_seed, axis=0)
    weights = np.ones(len(differences)) if pairs[0][0].weights is None else np.asarray(pairs[0][0].weights, float)
    low, high = statistics.bootstrap_interval(differences.tolist(), weights.tolist()) or (None, None)
    detectable = statistics.minimum_detectable_effect(differences.tolist())
    return Comparison(
        name,
        "documents",
        len(differences),
        float(differences.sum() / weights.sum()),
        low,
        high,
        statistics.sign_flip_p(differences.tolist()),
        smallest_visible=None if detectable is None else detectable * len(differences) / float(weights.sum()),
    )


def _comparable_runs(study: Study, records: Sequence[Record], arm: str) -> dict[int, Record]:
    """Return the successful runs of an arm that have the study's metric, by seed."""
    return {
        record.seed: record
        for record in records
        if record.arm == arm
        and record.error is None
        and record.metrics.get(study.metric) is not None
        and record.seed in study.seeds
    }


def _value(study: Study, record: Record) -> float:
    """Return the study's metric of a comparable run."""
    value = record.metrics[study.metric]
    assert value is not None, "the run is comparable"
    return value
