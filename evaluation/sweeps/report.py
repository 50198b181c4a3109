"""A sweep's answer as files: results.parquet, results.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from dlm_ray.evaluation.sweeps.ranking import Ranked, TrialResult, is_number

from dlm_ray.config import space as spaces
from dlm_ray.config.sweep import Sweep
from dlm_ray.report import figures
from dlm_ray.report.page import Block, Figure, Numbers, Paragraph, Table, page

_UNITS = {
    "bits_per_byte": "bits per byte, bound over all of t",
    "nelbo_variance": "variance of a block's bound, at common draws",
    "gradient_variance": "variance of a batch's gradient",
    "tokens_per_second": "tokens/s",
}


def write(
    sweep: Sweep, found: Sequence[Ranked], confirmed: Sequence[TrialResult], out: Path, seconds: float
) -> list[Path]:
    """results.parquet (a row a trial, settings as JSON and as columns), results.json and report.html into `out`."""
    lines = [fields_of(one) for one in found] + [
        {**fields_of(Ranked(row, None, None, None, None)), "status": "confirmed"} for row in confirmed
    ]
    keys = list(sweep.space)
    # A column of a key holds values of any kind, and parquet's of one: all are written as JSON.
    columns = [
        {**line, **{key: json.dumps(line["settings"][key]) if key in line["settings"] else None for key in keys}}
        for line in lines
    ]
    table = pa.Table.from_pylist(
        [{**line, "settings": json.dumps(line["settings"]), "clones": json.dumps(line["clones"])} for line in columns]
    )
    pq.write_table(table, out / "results.parquet")
    (out / "results.json").write_text(json.dumps(lines, indent=1) + "\n")
    (out / "report.html").write_text(page(sweep.name, _blocks(sweep, found, confirmed, seconds)))
    return [out / name for name in ("results.parquet", "results.json", "report.html")]


def fields_of(one: Ranked) -> dict[str, Any]:
    """A trial as plain values, but for what is measured by document."""
    measured = one.row.measured
    names = (
        "bits_per_byte",
        "is_bound",
        "ci95_documents",
        "ci95_draws",
        "nelbo_variance",
        "gradient_variance",
        "nll_by_t",
        "tokens_per_second",
    )
    return {
        "number": one.row.number,
        "settings": dict(one.row.settings),
        "status": one.row.status,
        "reason": one.row.reason,
        "step": one.row.step,
        "place": one.place,
        "difference": one.difference,
        "difference_low": one.low,
        "difference_high": one.high,
        "tied": one.is_tied,
        **{name: measured.get(name) for name in names},
        "clones": [dict(clone) for clone in one.row.clones],
        "run_dir": one.row.run_dir,
    }


def _blocks(sweep: Sweep, found: Sequence[Ranked], confirmed: Sequence[TrialResult], seconds: float) -> list[Block]:
    counts = {status: sum(one.row.status == status for one in found) for status in ("finished", "stopped", "failed")}
    blocks: list[Block] = [
        Numbers(
            [
                *((str(count), status) for status, count in counts.items()),
                (f"{seconds / 60:.1f}", "minutes of this call"),
            ]
        ),
        Paragraph(
            f"Ranked by {_UNITS[sweep.metric]}"
            + (f", among trials of the same {sweep.rank_by}" if sweep.rank_by else "")
            + f". All trials are scored on the same {sweep.measure.sequences} held-out rows with the same {sweep.measure.draws_per_sequence} draws each, over all of t "
            "whatever they were trained on. `tied` cannot be told from the best of its group: the paired 95 % interval covers 0. With one document, or a "
            "metric that does not pair, there is no interval, and whether a trial is tied is not known. What was stopped saw fewer tokens "
            "and is not ranked. One seed a trial unless `seed` is in the table: intervals are not over training seeds.",
            "The answer",
        ),
        Table("Trials", *_without_empty(_HEADER, [_cells(one) for one in found])),
    ]
    if confirmed:
        header = ("settings", "steps", "bits per byte", "95 % over documents", "variance of a block's bound")
        cells = [
            (
                row.name,
                str(row.step),
                _value(row, "bits_per_byte"),
                _range(row.measured.get("ci95_documents")),
                _value(row, "nelbo_variance"),
            )
            for row in confirmed
        ]
        blocks.append(
            Table(
                f"The best, confirmed by a longer run ({', '.join(sweep.confirm.overrides if sweep.confirm else ())})",
                header,
                cells,
            )
        )
    blocks += _heat_maps(sweep, found)
    lines = [one.row for one in found if one.row.measured]
    if len(lines) > 1:
        axes = [*sweep.space, sweep.metric]
        values = [
            [*(_place(row.settings, key) for key in sweep.space), row.measured.get(sweep.metric)] for row in lines
        ]
        blocks.append(
            Figure(
                figures.parallel(axes, values),
                f"Each line a trial, from its settings to its {sweep.metric}; the darker, the "
                + ("better" if sweep.mode == "min" else "worse"),
            )
        )
    curves = {row.name: row.curve for row in [one.row for one in found][: len(figures.COLOURS)] if row.curve}
    if curves:
        blocks.append(
            Figure(
                figures.curves(curves, "tokens", "bits per byte"),
                "Bound of the validation in the loop, the first of the table",
            )
        )
    by_t = [
        [row.name, *(f"{value:.3f}" for value in row.measured["nll_by_t"])]
        for row in lines
        if row.measured.get("nll_by_t")
    ]
    if by_t:
        edges = [f"t {number / 5:.1f} to {(number + 1) / 5:.1f}" for number in range(len(by_t[0]) - 1)]
        blocks.append(Table("Cross-entropy by t, nats a masked token", ["settings", *edges], by_t))
    return blocks


_HEADER = (
    "place", "settings", "status", "steps", "bits per byte", "95 % over documents", "variance of a block's bound", "gradient variance",
    "less the best", "95 %, paired", "", "tokens/s",
)  # fmt: skip


_TIED = {True: "tied", False: "", None: "no interval"}


def _cells(one: Ranked) -> list[str]:
    row = one.row
    clones = "; ".join(f"copy of {clone['from']} at step {clone['step']}" for clone in row.clones)
    return [
        str(one.place or ""),
        row.name,
        row.status,
        str(row.step),
        _value(row, "bits_per_byte"),
        _range(row.measured.get("ci95_documents")),
        _value(row, "nelbo_variance"),
        _value(row, "gradient_variance"),
        "" if one.difference is None or one.place == 1 else f"{one.difference:+.4g}",
        "" if one.place == 1 or one.low is None else _range([one.low, one.high], "+.3g"),
        "; ".join(text for text in (_TIED[one.is_tied], row.reason, clones) if text),
        _value(row, "tokens_per_second", ".0f"),
    ]


def _place(settings: Mapping[str, Any], key: str) -> Any:
    """On an upright axis: numbers stay numbers, and a key that this trial does not have stays empty."""
    value = settings.get(key)
    return value if key not in settings or isinstance(value, int | float) else spaces.shown(value)


def _without_empty(header: Sequence[str], cells: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns in which nothing was measured."""
    kept = [number for number in range(len(header)) if any(row[number] for row in cells)]
    return [header[number] for number in kept], [[row[number] for number in kept] for row in cells]


def _heat_maps(sweep: Sweep, found: Sequence[Ranked]) -> list[Block]:
    """The metric over beta and omega for every group that tried clips."""
    blocks: list[Block] = []
    for group in dict.fromkeys(one.row.group(sweep.rank_by) for one in found):
        cells = {}
        for one in found:
            clip = one.row.settings.get("objective.clip", "")
            value = one.row.measured.get(sweep.metric)
            if one.row.group(sweep.rank_by) == group and clip != "" and is_number(value):
                # The best comes first: of trials that differ in something else, too, it stands for its interval.
                cells.setdefault((clip["beta"], clip["omega"]) if clip else (0.0, 1.0), value)
        if len(cells) > 1:
            title = f"{sweep.metric}" + (f", {sweep.rank_by} {group}" if sweep.rank_by else "")
            blocks.append(
                Figure(
                    figures.heat_map(cells, "beta", "omega", title),
                    f"{_UNITS[sweep.metric]}; of each interval the best trial, stopped ones included; the smallest is framed",
                )
            )
    return blocks


def _value(row: TrialResult, name: str, form: str = ".4g") -> str:
    value = row.measured.get(name)
    return "" if value is None else format(value, form)


def _range(interval: Any, form: str = ".4g") -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}" if interval else ""
