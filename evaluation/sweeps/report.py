"""The result of a sweep as files: results.parquet, results.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from dlm_ray.evaluation.sweeps.ranking import Ranked, TrialResult, is_number

from dlm_ray.config import space as spaces
from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.sweep import Sweep
from dlm_ray.report import figures
from dlm_ray.report.page import Block, Figure, Numbers, Paragraph, Table, page

_TITLES = {
    "bits_per_byte": "bits per byte, bound over all of t",
    "nelbo_variance": "variance of a block's bound, at common draws",
    "gradient_variance": "variance of a batch's gradient",
    "tokens_per_second": "tokens/s",
}
_MEASURED_FIELDS = (
    "bits_per_byte",
    "is_bound",
    "ci95_documents",
    "ci95_draws",
    "nelbo_variance",
    "gradient_variance",
    "nll_by_t",
    "tokens_per_second",
)
_TRIALS_HEADER = (
    "place",
    "settings",
    "status",
    "steps",
    "bits per byte",
    "95 % over documents",
    "variance of a block's bound",
    "gradient variance",
    "difference to the best",
    "95 %, paired",
    "notes",
    "tokens/s",
)
_TIED = {True: "tied", False: "", None: "no interval"}


def write(
    sweep: Sweep, ranking: Sequence[Ranked], confirmed: Sequence[TrialResult], out: Path, seconds: float
) -> list[Path]:
    """Write results.parquet, results.json and report.html into `out` and return their paths.

    Args:
        sweep: the configuration.
        ranking: all trials in the order of `ranking.ranked`.
        confirmed: the longer runs of the best trials.
        out: the folder for the files.
        seconds: the wall time of this call.
    """
    lines = [fields_of(entry) for entry in ranking]
    lines += [{**fields_of(Ranked(trial)), "status": "confirmed"} for trial in confirmed]
    _write_parquet(sweep, lines, out / "results.parquet")
    (out / "results.json").write_text(json.dumps(lines, indent=1) + "\n")
    (out / "report.html").write_text(page(sweep.name, _blocks(sweep, ranking, confirmed, seconds)))
    return [out / name for name in ("results.parquet", "results.json", "report.html")]


def fields_of(entry: Ranked) -> JsonObject:
    """Return a ranked trial as JSON values, without its measurements per document."""
    trial = entry.trial
    return {
        "number": trial.number,
        "settings": dict(trial.settings),
        "status": trial.status,
        "reason": trial.reason,
        "step": trial.step,
        "place": entry.place,
        "difference": entry.difference,
        "difference_low": entry.low,
        "difference_high": entry.high,
        "tied": entry.is_tied,
        **{name: trial.measured.get(name) for name in _MEASURED_FIELDS},
        "clones": [dict(clone) for clone in trial.clones],
        "run_dir": trial.run_dir,
    }


def _write_parquet(sweep: Sweep, lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a row per trial, with its settings as one JSON column and as a column per key of the space.

    Those columns are JSON, too, because a key may have values of several types and a parquet column has one.
    """
    rows = []
    for line in lines:
        settings = line["settings"]
        columns = {key: json.dumps(settings[key]) if key in settings else None for key in sweep.space}
        rows.append({**line, **columns, "settings": json.dumps(settings), "clones": json.dumps(line["clones"])})
    pq.write_table(pa.Table.from_pylist(rows), path)


def _blocks(sweep: Sweep, ranking: Sequence[Ranked], confirmed: Sequence[TrialResult], seconds: float) -> list[Block]:
    """Return the blocks of report.html."""
    counts = {
        status: sum(entry.trial.status == status for entry in ranking) for status in ("finished", "stopped", "failed")
    }
    numbers = [(str(count), status) for status, count in counts.items()]
    blocks: list[Block] = [
        Numbers([*numbers, (f"{seconds / 60:.1f}", "minutes of this call")]),
        Paragraph(_explanation(sweep), "Result"),
        Table("Trials", *_without_empty_columns(_TRIALS_HEADER, [_cells(entry) for entry in ranking])),
    ]
    if confirmed:
        blocks.append(_confirmed_table(sweep, confirmed))
    measured = [entry.trial for entry in ranking if entry.trial.measured]
    return [
        *blocks,
        *_heat_maps(sweep, ranking),
        *_parallel_coordinates(sweep, measured),
        *_curves([entry.trial for entry in ranking]),
        *_nll_by_t_table(measured),
    ]


def _explanation(sweep: Sweep) -> str:
    """Return the paragraph that says how the trials are ranked."""
    groups = f", among trials with the same {sweep.rank_by}" if sweep.rank_by else ""
    return (
        f"Ranked by {_TITLES[sweep.metric]}{groups}. All trials are scored on the same {sweep.measure.sequences} "
        f"held-out sequences with the same {sweep.measure.draws_per_sequence} draws each, over all of t, whatever "
        "they were trained on. A trial called tied cannot be distinguished from the best of its group: the paired 95 % "
        "interval covers 0. With one document, or with a metric that has no pairs, there is no interval, and "
        "whether a trial is tied is unknown. Stopped trials saw fewer tokens and are not ranked. Each trial has "
        "one training seed unless the table has a seed: intervals are not over training seeds."
    )


def _confirmed_table(sweep: Sweep, confirmed: Sequence[TrialResult]) -> Table:
    """Return the table of the longer runs."""
    header = ("settings", "steps", "bits per byte", "95 % over documents", "variance of a block's bound")
    rows = [
        (
            trial.name,
            str(trial.step),
            _value(trial, "bits_per_byte"),
            _range(trial.measured.get("ci95_documents")),
            _value(trial, "nelbo_variance"),
        )
        for trial in confirmed
    ]
    overrides = ", ".join(sweep.confirm.overrides if sweep.confirm else ())
    return Table(f"The best trials, confirmed by a longer run ({overrides})", header, rows)


def _heat_maps(sweep: Sweep, ranking: Sequence[Ranked]) -> list[Block]:
    """Return a heat map of the metric over beta and omega for every group that has several clips."""
    blocks: list[Block] = []
    for group in dict.fromkeys(entry.trial.group(sweep.rank_by) for entry in ranking):
        cells: dict[tuple[float, float], float] = {}
        for entry in ranking:
            clip = entry.trial.settings.get("objective.clip", "")
            value = entry.trial.measured.get(sweep.metric)
            if entry.trial.group(sweep.rank_by) == group and clip != "" and value is not None and is_number(value):
                # Trials of one clip may differ in other settings; the first is the best.
                cells.setdefault((clip["beta"], clip["omega"]) if clip else (0.0, 1.0), value)
        if len(cells) > 1:
            title = f"{sweep.metric}" + (f", {sweep.rank_by} {group}" if sweep.rank_by else "")
            caption = (
                f"{_TITLES[sweep.metric]}; the best trial of each interval, including stopped trials; the smallest "
                "value is framed"
            )
            blocks.append(Figure(figures.heat_map(cells, "beta", "omega", title), caption))
    return blocks


def _parallel_coordinates(sweep: Sweep, trials: Sequence[TrialResult]) -> list[Block]:
    """Return the figure of all trials' settings and metric, if there are several trials."""
    if len(trials) < 2:
        return []
    lines = [
        [*(_axis_value(trial.settings, key) for key in sweep.space), trial.measured.get(sweep.metric)]
        for trial in trials
    ]
    darker = "better" if sweep.mode == "min" else "worse"
    caption = f"One line per trial, from its settings to its {sweep.metric}; darker is {darker}"
    return [Figure(figures.parallel([*sweep.space, sweep.metric], lines), caption)]


def _curves(trials: Sequence[TrialResult]) -> list[Block]:
    """Return the figure of the validation curves of the first trials of the table, one per colour."""
    curves = {trial.name: trial.curve for trial in trials[: len(figures.COLOURS)] if trial.curve}
    if not curves:
        return []
    caption = "Bound of the validation during training, for the first trials of the table"
    return [Figure(figures.curves(curves, "tokens", "bits per byte"), caption)]


def _nll_by_t_table(trials: Sequence[TrialResult]) -> list[Block]:
    """Return the table of the cross-entropy in five intervals of t, if it was measured."""
    rows = [
        [trial.name, *(f"{value:.3f}" for value in trial.measured["nll_by_t"])]
        for trial in trials
        if trial.measured.get("nll_by_t")
    ]
    if not rows:
        return []
    intervals = [f"t {number / 5:.1f} to {(number + 1) / 5:.1f}" for number in range(len(rows[0]) - 1)]
    return [Table("Cross-entropy by t, nats per masked token", ["settings", *intervals], rows)]


def _cells(entry: Ranked) -> list[str]:
    """Return the cells of a trial, in the order of _TRIALS_HEADER."""
    trial = entry.trial
    clones = "; ".join(f"copy of {clone['from']} at step {clone['step']}" for clone in trial.clones)
    is_best = entry.place == 1
    return [
        str(entry.place or ""),
        trial.name,
        trial.status,
        str(trial.step),
        _value(trial, "bits_per_byte"),
        _range(trial.measured.get("ci95_documents")),
        _value(trial, "nelbo_variance"),
        _value(trial, "gradient_variance"),
        "" if entry.difference is None or is_best else f"{entry.difference:+.4g}",
        "" if entry.low is None or entry.high is None or is_best else _range([entry.low, entry.high], "+.3g"),
        "; ".join(text for text in (_TIED[entry.is_tied], trial.reason, clones) if text),
        _value(trial, "tokens_per_second", ".0f"),
    ]


def _axis_value(settings: Mapping[str, Any], key: str) -> Any:
    """Return a setting for an axis: numbers stay numbers, other values become text, and a missing key is None."""
    value = settings.get(key)
    return value if key not in settings or isinstance(value, int | float) else spaces.shown(value)


def _without_empty_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Return a table without the columns that are empty in all rows."""
    kept = [number for number in range(len(header)) if any(row[number] for row in rows)]
    return [header[number] for number in kept], [[row[number] for number in kept] for row in rows]


def _value(trial: TrialResult, name: str, form: str = ".4g") -> str:
    """Return a measurement as text, empty if there is none."""
    value = trial.measured.get(name)
    return "" if value is None else format(value, form)


def _range(interval: Sequence[float] | None, form: str = ".4g") -> str:
    """Return an interval as text, empty if there is none."""
    return f"{interval[0]:{form}} to {interval[1]:{form}}" if interval else ""
