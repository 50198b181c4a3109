"""A study's table, figure and numbers as files that can be committed: <name>.md, <name>.svg, <name>.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dlm_ray.evaluation.studies import statistics
from dlm_ray.evaluation.studies.runner import Comparison, Record, Study, Verdict, compare, orderings

from dlm_ray.report import figures


def write_report(study: Study, records: Sequence[Record], out: Path, hardware: str, notes: Sequence[str]) -> list[Path]:
    """Writes the three files; the same records give the same bytes.

    Args:
        study, records: what was asked, and the runs.
        out: a folder.
        hardware: what the runs ran on.
        notes: paragraphs for the reader.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    compared, verdicts = compare(study, records), orderings(study, records)
    paths = [out / f"{study.name}.{kind}" for kind in ("md", "svg", "json")]
    paths[0].write_text(_markdown(study, records, compared, verdicts, hardware, notes))
    _figure(study, records).savefig(
        paths[1], format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None}
    )
    numbers = {
        "study": study.name,
        "question": study.question,
        "metric": study.metric,
        "unit": study.unit,
        "seeds": list(study.seeds),
        "baseline": study.baseline,
        "published": {arm.name: arm.published for arm in study.arms},
        "hardware": hardware,
        "dates": _dates(records),
        "comparisons": [asdict(one) for one in compared],
        "orderings": [asdict(one) for one in verdicts],
        "runs": [
            {key: value for key, value in asdict(record).items() if key not in ("documents", "weights")}
            for record in records
        ],
        "notes": list(notes),
    }
    paths[2].write_text(json.dumps(numbers, indent=1) + "\n")
    return paths


def _markdown(
    study: Study,
    records: Sequence[Record],
    compared: Sequence[Comparison],
    verdicts: Sequence[Verdict],
    hardware: str,
    notes: Sequence[str],
) -> str:
    metrics = sorted({name for record in records for name in record.metrics} - {study.metric})
    header = ["arm", "seeds", f"{study.unit} (95 %, seeds)", "less the baseline, over seeds", "over documents"]
    header += [f"{metric} / {study.baseline}'s" if metric in study.ratios else metric for metric in metrics] + [
        "published"
    ]
    rows = []
    for arm in study.arms:
        own = [record for record in records if record.arm == arm.name and record.error is None]
        values = [record.metrics[study.metric] for record in own if record.metrics.get(study.metric) is not None]
        cells = [
            arm.name,
            str(len(own)),
            _interval(*statistics.t_interval([value for value in values if value is not None])) if values else "none",
        ]
        for over in ("training seeds", "documents"):
            found = [one for one in compared if one.arm == arm.name and one.over == over]
            cells.append(_comparison(found[0]) if found else "baseline" if arm.name == study.baseline else "")
        for metric in metrics:
            numbers = [
                value / _beside(study, records, metric, record.seed)
                for record in own
                if (value := record.metrics.get(metric)) is not None
            ]
            cells.append(f"{sum(numbers) / len(numbers):.4g}" if numbers else "")
        rows.append([*cells, arm.published])
    seeds = ", ".join(map(str, study.seeds))
    lines = [
        f"# Study `{study.name}`",
        "",
        study.question,
        "",
        f"{_dates(records)}; {hardware}; seeds {seeds}; baseline {study.baseline}. Lower is better.",
        "",
        _table(header, rows),
        "",
        "p values are corrected by Holm within the seeds (paired t) and within the documents (flips of signs, given these trained models), never over "
        "both. `sees` is the smallest difference that this n and spread would have shown with a power of 0.8.",
        "",
        f"![{study.unit} by arm]({study.name}.svg)",
        "",
    ]
    if verdicts:
        claims = [
            [f"{v.better} below {v.worse}", v.source, _interval(v.difference, v.low, v.high, signed=True), v.verdict]
            for v in verdicts
        ]
        lines += [
            "## The published orderings at this size",
            "",
            _table(["claim", "where", "difference (95 %, seeds)", "verdict"], claims),
            "",
        ]
    failed = [record for record in records if record.error is not None]
    if failed:
        lines += [
            "## Runs that failed",
            "",
            *(f"- {record.arm}, seed {record.seed}: {' '.join((record.error or '').split())}" for record in failed),
            "",
        ]
    missing = [
        f"{arm.name}, seed {seed}"
        for arm in study.arms
        for seed in study.seeds
        if (arm.name, seed) not in {(r.arm, r.seed) for r in records}
    ]
    if missing:
        lines += ["## Runs that are missing", "", *(f"- {name}" for name in missing), ""]
    lines += ["## Notes", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)


def _figure(study: Study, records: Sequence[Record]) -> Any:
    rows = []
    for arm in study.arms:
        values = [
            value
            for record in records
            if record.arm == arm.name
            and record.error is None
            and (value := record.metrics.get(study.metric)) is not None
        ]
        if values:
            mean, low, high = statistics.t_interval(values)
            label = f"{arm.name} ({arm.published})" if arm.published else arm.name
            rows.append((label, mean, low, high))
    return figures.intervals(rows, f"{study.unit}; in brackets: published")


def _beside(study: Study, records: Sequence[Record], metric: str, seed: int) -> float:
    """What a metric is divided by: 1, or the baseline's of the same seed."""
    if metric not in study.ratios:
        return 1.0
    base = [record.metrics.get(metric) for record in records if record.arm == study.baseline and record.seed == seed]
    return base[0] if base and base[0] else float("nan")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _comparison(one: Comparison) -> str:
    p = "" if one.p_holm is None else f", p {one.p_holm:.2g}"
    sees = "" if one.smallest_visible is None else f", sees {one.smallest_visible:.3f}"
    return f"{_interval(one.difference, one.low, one.high, signed=True)}{p}{sees} (n {one.n})"


def _interval(mean: float | None, low: float | None, high: float | None, signed: bool = False) -> str:
    if mean is None:
        return "none"
    form = "+.3f" if signed else ".3f"
    return f"{mean:{form}}" + ("" if low is None or high is None else f" ({low:{form}} to {high:{form}})")


def _dates(records: Sequence[Record]) -> str:
    days = sorted({record.date[:10] for record in records})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else "no runs"
