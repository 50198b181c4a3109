"""The study runner: arms x seeds into results.jsonl, run by run, and from there the comparisons, the table and the figure.

Two questions are asked and never mixed: would another training seed have said the same (pairs of runs of one seed), and would other
documents have (pairs of documents, given these trained models). Holm's correction is within each.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from dlm_ray.evaluation.studies import statistics

from dlm_ray.config.errors import Stopped, UserError


@dataclass(frozen=True)
class Arm:
    """One of the things compared."""

    name: str
    settings: Mapping[str, Any]
    """JSON-able: whatever the study's `one` needs."""
    published: str = ""
    """The paper's figure, as printed."""


@dataclass(frozen=True)
class Outcome:
    """What one run gave."""

    metrics: Mapping[str, float | None]
    documents: Sequence[float] | None = None
    """The metric's numerator by document, aligned over arms and seeds; lower is better."""
    weights: Sequence[float] | None = None
    """Its denominator by document."""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it."""

    name: str
    question: str
    metric: str
    """A key of `Outcome.metrics`; lower is better. An arm without it is listed and not compared."""
    unit: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    baseline: str
    orderings: tuple[tuple[str, str, str], ...] = ()
    """(better arm, worse arm, where that is claimed)."""
    ratios: tuple[str, ...] = ()
    """Metrics that mean something only beside the baseline's of the same seed."""

    def __post_init__(self) -> None:
        names = {arm.name for arm in self.arms}
        unknown = {self.baseline, *(name for ordering in self.orderings for name in ordering[:2])} - names
        if unknown:
            raise UserError(
                f"study {self.name} compares {sorted(unknown)}, which none of its arms {sorted(names)} is called"
            )
        if len({_folder_name(arm.name) for arm in self.arms}) < len(self.arms):
            raise UserError(
                f"study {self.name}: two of {sorted(names)} would share a folder; arms differ in letters or digits"
            )


@dataclass(frozen=True)
class Record:
    """One line of results.jsonl."""

    study: str
    arm: str
    seed: int
    fingerprint: str
    settings: Mapping[str, Any]
    date: str
    seconds: float
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    documents: Sequence[float] | None = None
    weights: Sequence[float] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Arm less baseline."""

    arm: str
    over: Literal["training seeds", "documents"]
    n: int
    difference: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None = None
    smallest_visible: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What became of a published ordering."""

    better: str
    worse: str
    source: str
    difference: float | None
    """Better less worse, mean over seeds: negative if the claim points the right way."""
    low: float | None
    high: float | None
    verdict: str


def run(
    study: Study,
    one: Callable[[Arm, int, Path], Outcome],
    out: Path,
    minutes: float | None = None,
    on_event: Callable[[str], None] | None = None,
) -> list[Record]:
    """Runs what is not in `out`/results.jsonl yet, all arms of a seed before the next seed, and appends a line a run.

    Args:
        study: the arms and seeds.
        one: trains and measures one arm with one seed in a folder of its own; what it raises is a failed row, and is tried again next time.
        out: where results.jsonl and runs/ lie.
        minutes: no run is started that would end later, judged by the longest so far; one is always made.
        on_event: told about every run.

    Raises:
        UserError: if `out` holds a run of the same arm and seed with other settings.
    """
    say = on_event or (lambda message: None)
    out.mkdir(parents=True, exist_ok=True)
    known = {(record.arm, record.seed): record for record in read(out, say)}
    for arm in study.arms:
        for seed in study.seeds:
            _check_same(study, arm, known.get((arm.name, seed)), out)
    started, longest, made = time.monotonic(), 0.0, 0
    for seed in study.seeds:
        for arm in study.arms:
            record = known.get((arm.name, seed))
            if record is not None and record.error is None:
                continue
            if minutes is not None and made and time.monotonic() - started + longest > 60 * minutes:
                say(f"left out for lack of time: {arm.name}, seed {seed}")
                continue
            say(f"{arm.name}, seed {seed}")
            record = _one(study, arm, seed, one, out)
            say(
                f"{arm.name}, seed {seed}: {record.error or record.metrics.get(study.metric)} after {record.seconds:.0f} s"
            )
            known[arm.name, seed] = record
            longest, made = max(longest, record.seconds), made + 1
    return [known[arm.name, seed] for arm in study.arms for seed in study.seeds if (arm.name, seed) in known]


def read(out: Path, on_event: Callable[[str], None] | None = None) -> list[Record]:
    """The runs of `out`/results.jsonl, the last of an arm and seed; a torn last line is cut off, because its run did not end."""
    path = out / "results.jsonl"
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        (on_event or (lambda message: None))(f"{path}: the last line is torn; its run is made again")
        path.write_bytes(whole)
    found = [Record(**json.loads(line)) for line in whole.decode().splitlines()]
    return list({(record.arm, record.seed): record for record in found}.values())


def compare(study: Study, records: Sequence[Record]) -> list[Comparison]:
    """Every arm against the baseline, over training seeds and over documents, Holm-corrected within each.

    Over seeds the p is of a t test: with three pairs flips of signs could not go below 0.25.
    """
    by_arm = {arm.name: _comparable(study, records, arm.name) for arm in study.arms}
    base, found = by_arm[study.baseline], []
    for name, own in by_arm.items():
        seeds = sorted(own.keys() & base.keys())
        if name == study.baseline or not seeds:
            continue
        differences = [_value(study, own[seed]) - _value(study, base[seed]) for seed in seeds]
        mean, low, high = statistics.t_interval(differences)
        visible = statistics.smallest_visible_effect(differences)
        found.append(
            Comparison(
                name,
                "training seeds",
                len(seeds),
                mean,
                low,
                high,
                statistics.t_test_p(differences),
                smallest_visible=visible,
            )
        )
        pairs = [
            (own[seed], base[seed])
            for seed in seeds
            if own[seed].documents is not None and base[seed].documents is not None
        ]
        if pairs:
            found.append(_over_documents(name, pairs))
    for over in ("training seeds", "documents"):
        tested = [i for i, one in enumerate(found) if one.over == over and one.p is not None]
        for i, p_holm in zip(tested, statistics.holm([found[i].p or 0.0 for i in tested]), strict=True):
            found[i] = Comparison(**{**asdict(found[i]), "p_holm": p_holm})
    return found


def orderings(study: Study, records: Sequence[Record]) -> list[Verdict]:
    """Every claimed ordering: held or reversed if the 95 % interval over training seeds lies on one side of 0, else not resolved."""
    found = []
    for better, worse, source in study.orderings:
        one, other = _comparable(study, records, better), _comparable(study, records, worse)
        differences = [
            _value(study, one[seed]) - _value(study, other[seed]) for seed in sorted(one.keys() & other.keys())
        ]
        if not differences:
            found.append(Verdict(better, worse, source, None, None, None, "not comparable"))
            continue
        mean, low, high = statistics.t_interval(differences)
        verdict = "not resolved at this size"
        if low is not None and high is not None and (high < 0 or low > 0):
            verdict = "held" if high < 0 else "reversed"
        found.append(Verdict(better, worse, source, mean, low, high, verdict))
    return found


def _over_documents(name: str, pairs: Sequence[tuple[Record, Record]]) -> Comparison:
    """Differences by document, averaged over seeds; the ratio to the documents' weights keeps the unit of the metric."""
    differences = np.mean(
        [np.asarray(own.documents, float) - np.asarray(base.documents, float) for own, base in pairs], axis=0
    )
    weights = np.ones(len(differences)) if pairs[0][0].weights is None else np.asarray(pairs[0][0].weights, float)
    low, high = statistics.bootstrap_interval(differences.tolist(), weights.tolist()) or (None, None)
    visible = statistics.smallest_visible_effect(differences.tolist())
    return Comparison(
        name,
        "documents",
        len(differences),
        float(differences.sum() / weights.sum()),
        low,
        high,
        statistics.sign_flip_p(differences.tolist()),
        smallest_visible=None if visible is None else visible * len(differences) / float(weights.sum()),
    )


def _comparable(study: Study, records: Sequence[Record], arm: str) -> dict[int, Record]:
    return {
        record.seed: record
        for record in records
        if record.arm == arm
        and record.error is None
        and record.metrics.get(study.metric) is not None
        and record.seed in study.seeds
    }


def _value(study: Study, record: Record) -> float:
    value = record.metrics[study.metric]
    assert value is not None, "a comparable record"
    return value


def _fingerprint(study: Study, arm: Arm, seed: int) -> str:
    content = json.dumps([study.name, arm.name, arm.settings, seed], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _check_same(study: Study, arm: Arm, record: Record | None, out: Path) -> None:
    if record is None or record.error is not None or record.fingerprint == _fingerprint(study, arm, record.seed):
        return
    settings = json.loads(json.dumps(arm.settings))
    keys = [key for key in sorted({*settings, *record.settings}) if settings.get(key) != record.settings.get(key)]
    changed = (
        "; ".join(f"{key} was {record.settings.get(key)!r}, asked {settings.get(key)!r}" for key in keys)
        or "it is of another study"
    )
    raise UserError(f"{out} holds {arm.name} (seed {record.seed}) with other settings: {changed}; choose another --out")


def _folder_name(arm: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", arm).strip("-").lower()


def _plain(study: Study, outcome: Outcome) -> Outcome:
    """The outcome in the types that a line of JSON holds; what it cannot hold fails this run, not the study."""
    metrics = {name: None if value is None else float(value) for name, value in outcome.metrics.items()}
    value = metrics.get(study.metric)
    if value is not None and not math.isfinite(value):
        raise FloatingPointError(f"{study.metric} is {value}")
    documents, weights = (
        None if own is None else [float(one) for one in own] for own in (outcome.documents, outcome.weights)
    )
    return Outcome(metrics, documents, weights, json.loads(json.dumps(dict(outcome.details))))


def _one(study: Study, arm: Arm, seed: int, one: Callable[[Arm, int, Path], Outcome], out: Path) -> Record:
    folder = out / "runs" / f"{_folder_name(arm.name)}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    outcome, error = Outcome({}), None
    try:
        outcome = _plain(study, one(arm, seed, folder))
    except Stopped:  # SIGTERM: no outcome of this run, which goes on when the study does
        raise
    except Exception as failure:  # one row of the table, with its reason; the study goes on
        error = f"{type(failure).__name__}: {failure}"
    record = Record(
        study=study.name,
        arm=arm.name,
        seed=seed,
        fingerprint=_fingerprint(study, arm, seed),
        settings=dict(arm.settings),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 1),
        metrics=outcome.metrics,
        documents=outcome.documents,
        weights=outcome.weights,
        details=outcome.details,
        error=error,
    )
    with (out / "results.jsonl").open("a") as lines:
        lines.write(json.dumps(asdict(record)) + "\n")
        lines.flush()
        os.fsync(lines.fileno())
    return record
