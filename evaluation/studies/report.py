"""The report of a study as files to commit: <name>.md (table), <name>.svg (figure) and <name>.json (numbers)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlm_ray.evaluation.studies import statistics
from dlm_ray.evaluation.studies.comparison import Comparison, Verdict, compare, judge_orderings
from dlm_ray.evaluation.studies.runner import Arm, Record, Study

from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.report import figures


def write_report(study: Study, records: Sequence[Record], out: Path, hardware: str, notes: Sequence[str]) -> list[Path]:
    """Write the three files and return their paths; the same records give the same bytes.

    Args:
        study, records: the question and its runs.
        out: the folder for the files.
        hardware: the machine of the runs, in words.
        notes: paragraphs for the reader.
    """
    out.mkdir(parents=True, exist_ok=True)
    content = _Content(study, records, compare(study, records), judge_orderings(study, records), hardware, notes)
    table, figure, numbers = (out / f"{study.name}.{suffix}" for suffix in ("md", "svg", "json"))
    table.write_text(_markdown(content))
    _figure(study, records).savefig(figure, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    numbers.write_text(json.dumps(_numbers(content), indent=1) + "\n")
    return [table, figure, numbers]


@dataclass(frozen=True)
class _Content:
    """What the table and the numbers are made of."""

    study: Study
    records: Sequence[Record]
    comparisons: Sequence[Comparison]
    verdicts: Sequence[Verdict]
    hardware: str
    notes: Sequence[str]


def _numbers(content: _Content) -> JsonObject:
    """Return the fields of the JSON file; runs are without their values per document."""
    study, records = content.study, content.records
    return {
        "study": study.name,
        "question": study.question,
        "metric": study.metric,
        "unit": study.unit,
        "seeds": list(study.seeds),
        "baseline": study.baseline,
        "published": {arm.name: arm.published for arm in study.arms},
        "hardware": content.hardware,
        "dates": _dates(records),
        "comparisons": [asdict(comparison) for comparison in content.comparisons],
        "orderings": [asdict(verdict) for verdict in content.verdicts],
        "runs": [
            {key: value for key, value in asdict(record).items() if key not in ("documents", "weights")}
            for record in records
        ],
        "notes": list(content.notes),
    }


def _markdown(content: _Content) -> str:
    """Return the text of the Markdown file."""
    study, records = content.study, content.records
    seeds = ", ".join(map(str, study.seeds))
    sections = [
        f"# Study `{study.name}`",
        study.question,
        f"{_dates(records)}; {content.hardware}; seeds {seeds}; baseline {study.baseline}. Lower is better.",
        _arms_table(study, records, content.comparisons),
        "Differences are arm minus baseline with 95 % intervals. p values are Holm-corrected, separately over "
        "training seeds (paired t test) and over documents (sign flips, given these trained models). MDE is the "
        "minimum detectable effect: the difference that this n and spread detect with power 0.8.",
        f"![{study.unit} by arm]({study.name}.svg)",
    ]
    if content.verdicts:
        sections += ["## Published orderings at this size", _verdicts_table(content.verdicts)]
    failed = [record for record in records if record.error is not None]
    if failed:
        reasons = [f"{record.arm}, seed {record.seed}: {' '.join((record.error or '').split())}" for record in failed]
        sections += ["## Failed runs", _bullets(reasons)]
    known = {(record.arm, record.seed) for record in records}
    missing = [f"{a.name}, seed {seed}" for a in study.arms for seed in study.seeds if (a.name, seed) not in known]
    if missing:
        sections += ["## Missing runs", _bullets(missing)]
    sections += ["## Notes", _bullets(content.notes)]
    return "\n\n".join(sections) + "\n"


def _arms_table(study: Study, records: Sequence[Record], comparisons: Sequence[Comparison]) -> str:
    """Return the table with one row per arm."""
    metrics = sorted({name for record in records for name in record.metrics} - {study.metric})
    columns = [f"{metric} (ratio to {study.baseline})" if metric in study.ratios else metric for metric in metrics]
    header = [
        "arm",
        "seeds",
        f"{study.unit} (95 % over seeds)",
        "difference over seeds",
        "difference over documents",
        *columns,
        "published",
    ]
    return _table(header, [_arm_row(study, arm, records, comparisons, metrics) for arm in study.arms])


def _arm_row(
    study: Study, arm: Arm, records: Sequence[Record], comparisons: Sequence[Comparison], metrics: Sequence[str]
) -> list[str]:
    """Return the cells of an arm."""
    runs = [record for record in records if record.arm == arm.name and record.error is None]
    values = _values(study, records, arm)
    cells = [arm.name, str(len(runs)), _interval(*statistics.t_interval(values)) if values else "none"]
    for over in ("training seeds", "documents"):
        cell = "baseline" if arm.name == study.baseline else ""
        for comparison in comparisons:
            if comparison.arm == arm.name and comparison.over == over:
                cell = _comparison(comparison)
        cells.append(cell)
    for metric in metrics:
        numbers = [
            value / _divisor(study, records, metric, run.seed)
            for run in runs
            if (value := run.metrics.get(metric)) is not None
        ]
        cells.append(f"{sum(numbers) / len(numbers):.4g}" if numbers else "")
    return [*cells, arm.published]


def _verdicts_table(verdicts: Sequence[Verdict]) -> str:
    """Return the table of the published orderings."""
    rows = [
        [
            f"{verdict.better} below {verdict.worse}",
            verdict.source,
            _interval(verdict.difference, verdict.low, verdict.high, signed=True),
            verdict.verdict,
        ]
        for verdict in verdicts
    ]
    return _table(["claim", "source", "difference (95 % over seeds)", "verdict"], rows)


def _figure(study: Study, records: Sequence[Record]) -> Any:
    """Return the matplotlib figure of the metric's mean and interval by arm."""
    rows = []
    for arm in study.arms:
        values = _values(study, records, arm)
        if values:
            mean, low, high = statistics.t_interval(values)
            label = f"{arm.name} ({arm.published})" if arm.published else arm.name
            rows.append((label, mean, low, high))
    return figures.intervals(rows, f"{study.unit}; published values in brackets")


def _values(study: Study, records: Sequence[Record], arm: Arm) -> list[float]:
    """Return the study's metric of the successful runs of an arm."""
    return [
        value
        for record in records
        if record.arm == arm.name and record.error is None and (value := record.metrics.get(study.metric)) is not None
    ]


def _divisor(study: Study, records: Sequence[Record], metric: str, seed: int) -> float:
    """Return what a metric is divided by: the baseline's value of the same seed for a ratio, 1 otherwise."""
    if metric not in study.ratios:
        return 1.0
    baseline = [
        record.metrics.get(metric) for record in records if record.arm == study.baseline and record.seed == seed
    ]
    return baseline[0] if baseline and baseline[0] else math.nan


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _bullets(items: Sequence[str]) -> str:
    """Return a Markdown list."""
    return "\n".join(f"- {item}" for item in items)


def _comparison(comparison: Comparison) -> str:
    """Return a comparison as the text of a cell."""
    text = _interval(comparison.difference, comparison.low, comparison.high, signed=True)
    if comparison.p_holm is not None:
        text += f", p {comparison.p_holm:.2g}"
    if comparison.smallest_visible is not None:
        text += f", MDE {comparison.smallest_visible:.3f}"
    return f"{text} (n {comparison.n})"


def _interval(mean: float | None, low: float | None, high: float | None, signed: bool = False) -> str:
    """Return `mean (low to high)`, without the interval if there is none."""
    if mean is None:
        return "none"
    form = "+.3f" if signed else ".3f"
    return f"{mean:{form}}" + ("" if low is None or high is None else f" ({low:{form}} to {high:{form}})")


def _dates(records: Sequence[Record]) -> str:
    """Return the first and the last day of the runs."""
    days = sorted({record.date[:10] for record in records})
    if not days:
        return "no runs"
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
