"""The study runner: train and measure every arm with every seed, one line of results.jsonl per run."""

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
from typing import Any

from dlm_ray.config.errors import Stopped, UserError

Emit = Callable[[str], None]


@dataclass(frozen=True)
class Arm:
    """One of the methods that a study compares."""

    name: str
    settings: Mapping[str, Any]
    """JSON values that tell the study how to run the arm."""
    published: str = ""
    """The figure as the paper prints it."""


@dataclass(frozen=True)
class Outcome:
    """The measurements of one run."""

    metrics: Mapping[str, float | None]
    documents: Sequence[float] | None = None
    """The metric's numerator for each document, in the same order for all arms and seeds; lower is better."""
    weights: Sequence[float] | None = None
    """The metric's denominator for each document."""
    details: Mapping[str, Any] = field(default_factory=dict)


RunArm = Callable[[Arm, int, Path], Outcome]
"""Trains and measures an arm with a seed in a folder of its own."""


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it."""

    name: str
    question: str
    metric: str
    """A key of `Outcome.metrics`; lower is better. An arm without it is listed but not compared."""
    unit: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    baseline: str
    """The name of the arm that all others are compared with."""
    orderings: tuple[tuple[str, str, str], ...] = ()
    """Published claims: (better arm, worse arm, source of the claim)."""
    ratios: tuple[str, ...] = ()
    """Metrics that the report divides by the baseline's of the same seed."""

    def __post_init__(self) -> None:
        names = {arm.name for arm in self.arms}
        unknown = {self.baseline, *(name for ordering in self.orderings for name in ordering[:2])} - names
        if unknown:
            raise UserError(f"study {self.name} compares unknown arms {sorted(unknown)}; its arms are {sorted(names)}")
        if len({_folder_name(arm.name) for arm in self.arms}) < len(self.arms):
            raise UserError(
                f"study {self.name}: two of the arms {sorted(names)} would share a folder; names must differ in their "
                "letters or digits"
            )


@dataclass(frozen=True)
class Record:
    """One run, as a line of results.jsonl."""

    study: str
    arm: str
    seed: int
    fingerprint: str
    """A hash of study, arm, settings and seed."""
    settings: Mapping[str, Any]
    date: str
    seconds: float
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    documents: Sequence[float] | None = None
    weights: Sequence[float] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    """Why the run failed."""


def run(
    study: Study, run_arm: RunArm, out: Path, minutes: float | None = None, emit: Emit = lambda message: None
) -> list[Record]:
    """Run the arms and seeds that `out`/results.jsonl lacks, all arms of a seed before the next seed.

    Args:
        study: the arms and seeds.
        run_arm: runs one arm with one seed. If it raises, the run is recorded as failed and is repeated by the next
            call.
        out: the folder for results.jsonl and runs/.
        minutes: start no run that would end later, if it took as long as the longest before it; the first run always
            starts.
        emit: called with messages about progress.

    Raises:
        UserError: if `out` holds a run of the same arm and seed with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    records = {(record.arm, record.seed): record for record in read(out, emit)}
    for arm in study.arms:
        for seed in study.seeds:
            _check_settings(study, arm, records.get((arm.name, seed)), out)
    started, longest, num_runs = time.monotonic(), 0.0, 0
    for seed in study.seeds:
        for arm in study.arms:
            record = records.get((arm.name, seed))
            if record is not None and record.error is None:
                continue
            if minutes is not None and num_runs and time.monotonic() - started + longest > 60 * minutes:
                emit(f"skipped for lack of time: {arm.name}, seed {seed}")
                continue
            emit(f"{arm.name}, seed {seed}")
            record = _run_one(study, arm, seed, run_arm, out)
            result = record.error or record.metrics.get(study.metric)
            emit(f"{arm.name}, seed {seed}: {result} after {record.seconds:.0f} s")
            records[arm.name, seed] = record
            longest, num_runs = max(longest, record.seconds), num_runs + 1
    return [records[arm.name, seed] for arm in study.arms for seed in study.seeds if (arm.name, seed) in records]


def read(out: Path, emit: Emit = lambda message: None) -> list[Record]:
    """Return the last record of each arm and seed in `out`/results.jsonl.

    An incomplete last line, from a run that was interrupted, is removed from the file.
    """
    path = out / "results.jsonl"
    if not path.exists():
        return []
    content = path.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        emit(f"{path}: the last line is incomplete; its run is repeated")
        path.write_bytes(complete)
    records = [Record(**json.loads(line)) for line in complete.decode().splitlines()]
    return list({(record.arm, record.seed): record for record in records}.values())


def _run_one(study: Study, arm: Arm, seed: int, run_arm: RunArm, out: Path) -> Record:
    """Run one arm with one seed, append its record to results.jsonl, and return it."""
    folder = out / "runs" / f"{_folder_name(arm.name)}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    outcome, error = Outcome({}), None
    try:
        outcome = _as_json(study, run_arm(arm, seed, folder))
    except Stopped:  # on SIGTERM the run has no outcome; the next call resumes it
        raise
    except Exception as failure:  # a failed run is one row of the table; the study continues
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


def _as_json(study: Study, outcome: Outcome) -> Outcome:
    """Return the outcome in types that JSON holds; what JSON cannot hold fails this run and not the study.

    Raises:
        FloatingPointError: if the study's metric is not finite.
    """
    metrics = {name: None if value is None else float(value) for name, value in outcome.metrics.items()}
    value = metrics.get(study.metric)
    if value is not None and not math.isfinite(value):
        raise FloatingPointError(f"{study.metric} is {value}")
    details = json.loads(json.dumps(dict(outcome.details)))
    return Outcome(metrics, _as_floats(outcome.documents), _as_floats(outcome.weights), details)


def _as_floats(values: Sequence[float] | None) -> list[float] | None:
    return None if values is None else [float(value) for value in values]


def _check_settings(study: Study, arm: Arm, record: Record | None, out: Path) -> None:
    """Raise a UserError that names the changed settings if `record` was made with others than `arm` has."""
    if record is None or record.error is not None or record.fingerprint == _fingerprint(study, arm, record.seed):
        return
    settings = json.loads(json.dumps(arm.settings))
    keys = [key for key in sorted({*settings, *record.settings}) if settings.get(key) != record.settings.get(key)]
    changes = [f"{key} was {record.settings.get(key)!r} and is now {settings.get(key)!r}" for key in keys]
    raise UserError(
        f"{out} holds {arm.name} (seed {record.seed}) with other settings: "
        f"{'; '.join(changes) or 'it belongs to another study'}; choose another --out"
    )


def _fingerprint(study: Study, arm: Arm, seed: int) -> str:
    content = json.dumps([study.name, arm.name, arm.settings, seed], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _folder_name(arm: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", arm).strip("-").lower()
