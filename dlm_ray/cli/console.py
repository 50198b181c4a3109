"""Output of commands: messages, progress and tables. Stdout has the result only; everything else goes to stderr."""

from __future__ import annotations

import datetime
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dlm_ray.config.errors import reworded

LogFormat = Literal["text", "json"]

console = Console(stderr=True)
_LINE_SECONDS = 10.0
_LABEL_COLORS = {"stopped": "yellow", "damaged": "red", "error": "red", "failed": "red"}
_log_format: LogFormat = "text"


class Update(Protocol):
    """A callback that reports progress."""

    def __call__(self, done: int, total: int) -> None:
        """Report how much is done, and of how much."""


def show_result(fields: Mapping[str, Any], as_json: bool, show: Callable[[], object]) -> None:
    """Print the result of a command: as one JSON object on stdout, or with `show`."""
    if as_json:
        sys.stdout.write(json.dumps(fields, default=str) + "\n")
    else:
        show()


def set_log_format(name: LogFormat) -> None:
    """Choose how messages and progress are printed on stderr: as text, or as one JSON object per line."""
    global _log_format
    _log_format = name


def is_json_log() -> bool:
    """Return whether messages and progress are printed as JSON lines."""
    return _log_format == "json"


def print_message(message: str, label: str = "") -> None:
    """Print one message on stderr, after a label such as `error`."""
    if is_json_log():
        print_event(label or "message", message=message)
        return
    color = _LABEL_COLORS.get(label)
    prefix = f"[{color}]{label}:[/] " if color else f"{label}: " if label else ""
    console.print(prefix + escape(message), soft_wrap=True, highlight=False)


def print_event(event: str, **fields: Any) -> None:
    """Print an event on stderr as one JSON object, with the time."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    console.file.write(json.dumps({"event": event, "time": now, **fields}, default=str) + "\n")
    console.file.flush()


@contextmanager
def warnings_printed(flags: Callable[[], Mapping[str, str]] = dict) -> Iterator[None]:
    """Print Python warnings for users and log records of level WARNING as messages, without file names.

    Args:
        flags: returns the command-line flag of each Python parameter, which the warnings name.
    """

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            print_message(reworded(record.getMessage(), flags()), label="warning")

    logger, handler = logging.getLogger("dlm_ray"), Handler(logging.WARNING)
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: print_message(reworded(str(message), flags()), label="warning")
            yield
    finally:
        logger.removeHandler(handler)


class ProgressLines:
    """Progress as plain lines for logs: one every 10 seconds, and the last update if any line was printed before.

    Args:
        description: what each line begins with, such as `sequences x draws:`.
        clock: seconds; the time left is estimated from the first update on.
    """

    def __init__(self, description: str, clock: Callable[[], float] = time.monotonic):
        self._description, self._clock = description, clock
        self._start: tuple[float, int] | None = None
        self._printed_at = clock()
        self._has_printed, self._is_complete = False, False

    def __call__(self, done: int, total: int) -> None:
        """Print a line if one is due."""
        now = self._clock()
        self._start = self._start or (now, done)
        is_last = done >= total
        is_due = now - self._printed_at >= _LINE_SECONDS or (is_last and self._has_printed)
        if not is_due or self._is_complete:
            return
        self._printed_at, self._has_printed, self._is_complete = now, True, is_last
        seconds = seconds_left(now - self._start[0], done - self._start[1], total - done)
        if is_json_log():
            task = self._description.strip().rstrip(":")
            print_event("progress", task=task, done=done, total=total, seconds_left=seconds)
            return
        suffix = "" if seconds is None else f", {duration(seconds)} left"
        print_message(f"{self._description} {done} of {total}{suffix}")


def seconds_left(seconds: float, done: int, remaining: int) -> float | None:
    """Return the time for the remaining units at the speed so far; None if nothing is done or nothing remains."""
    return seconds / done * remaining if done > 0 and remaining > 0 else None


def duration(seconds: float) -> str:
    """Return a time such as 0:07:30 in hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _columns() -> tuple[Any, ...]:
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )


def is_live() -> bool:
    """Return whether stderr is a terminal that shows progress in place, and the log format is text."""
    return console.is_terminal and not console.is_dumb_terminal and not is_json_log()


@contextmanager
def progress(description: str) -> Iterator[Update]:
    """Show progress on stderr: a bar on a terminal, a line every 10 seconds elsewhere."""
    if not is_live():
        yield ProgressLines(description)
        return
    with Progress(*_columns(), console=console, transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def stage_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show the progress of consecutive stages; the caller gets show(stage, done, total).

    Each stage that begins gets a numbered line; the running one has a bar on a terminal, and lines elsewhere.
    """
    if not is_live():
        lines: dict[str, ProgressLines] = {}

        def print_lines(stage: str, done: int, total: int) -> None:
            if stage not in lines:
                lines[stage] = ProgressLines(f"    {stage}:")
                print_message(f"{len(lines):>2}. {stage} ...")
            lines[stage](done, total)

        yield print_lines
        return
    with Progress(*_columns(), console=console, transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[stage] = bar.add_task(f"{len(tasks) + 1:>2}. {stage}", total=None)
                bar.print(f"{len(tasks):>2}. {stage} ...")
            bar.update(tasks[stage], completed=done, total=total)

        yield show


def print_mapping(title: str, fields: Mapping[str, Any]) -> None:
    """Print names and values as a table."""
    table = Table(title=title, show_header=False)
    for name, value in fields.items():
        table.add_row(str(name), escape(str(value)))
    Console().print(table)


def print_splits(out: str, splits: Mapping[str, Mapping[str, int]]) -> None:
    """Print the sizes of a data folder's splits."""
    table = Table(title=out)
    table.add_column("split")
    for heading in ("sequences", "documents", "tokens"):
        table.add_column(heading, justify="right")
    for name, split in splits.items():
        table.add_row(name, *(f"{split[key]:,}" for key in ("sequences", "documents", "tokens")))
    Console().print(table)


def print_description(description: Mapping[str, Any]) -> None:
    """Print a data folder's tokenizer, splits and first sequences."""
    tokenizer = description["tokenizer"]
    print_message(
        f"sequences of {description['sequence_length']} tokens; tokenizer {tokenizer['name']}, "
        f"{tokenizer['vocab_size']} tokens, sha256 {tokenizer['sha256'][:12]}"
    )
    print_splits(description["path"], description["splits"])
    for number, sequence in enumerate(description.get("first_sequences", [])):
        print_message(f"sequence {number} of train:")
        for segment in sequence:
            print_message(f"  document {segment['document']}, {segment['tokens']} tokens: {segment['text'][:200]!r}")


def print_bits(scored: Mapping[str, Any]) -> None:
    """Print a likelihood in bits per byte with its confidence intervals."""
    interval = scored["ci95_documents"]
    note = (
        f"95 % over documents {interval[0]:.4f} to {interval[1]:.4f}"
        if interval
        else "no interval over documents, which needs at least two documents with text"
    )
    kind = "at most (a bound)" if scored["is_bound"] else "exactly"
    print_message(
        f"{kind} {scored['bits_per_byte']:.4f} bits per byte on {scored['documents']} documents, "
        f"{scored['bytes']:,} bytes; {note}"
    )
    if scored["ci95_draws"]:
        low, high = scored["ci95_draws"]
        print_message(
            f"95 % over draws, for these sequences: {low:.4f} to {high:.4f} ({scored['draws_per_sequence']} draws per "
            "sequence)"
        )


def print_clips(candidates: Sequence[Mapping[str, Any]], block_tokens: int, shown: int = 8) -> None:
    """Print the best candidates of a clip search, and the full range for comparison."""
    table = Table(title=f"clips for blocks of {block_tokens}, lowest variance first")
    for heading in ("beta", "omega", "variance of a block's bound", "masked tokens per block", "gradient variance"):
        table.add_column(heading, justify="right")
    full_range = [clip for clip in candidates[shown:] if clip["omega"] - clip["beta"] > 0.95]
    for clip in [*candidates[:shown], *full_range]:
        gradient = "" if clip["gradient_variance"] is None else f"{clip['gradient_variance']:.4g}"
        variance, masked = f"{clip['variance']:.4g}", f"{clip['masked_tokens']:.2f}"
        table.add_row(f"{clip['beta']:g}", f"{clip['omega']:g}", variance, masked, gradient)
    Console().print(table)
    best = candidates[0]
    print_message(f"train with: objective.clip={{beta: {best['beta']:g}, omega: {best['omega']:g}, weight: paper}}")


def print_sweep(result: Mapping[str, Any], metric: str, out: Path) -> None:
    """Print the trials of a sweep, the best first."""
    from dlm_ray.config.space import label

    table = Table(title=str(out))
    columns = tuple(dict.fromkeys(("bits_per_byte", metric)))
    for heading in ("place", "settings", "status", "steps", *columns, ""):
        table.add_column(heading)
    for trial in result["trials"]:
        numbers = ["" if trial[name] is None else f"{trial[name]:.4g}" for name in columns]
        remark = "tied with the best" if trial["tied"] else trial["reason"]
        if trial["tied"] is None and trial["place"] is not None:
            remark = "no interval of its difference from the best"
        place, settings = str(trial["place"] or ""), escape(label(trial["settings"]))
        table.add_row(place, settings, trial["status"], str(trial["step"]), *numbers, escape(remark))
    Console().print(table)
    print_message(f"report: {out / 'report.html'}   numbers: {out / 'results.parquet'}")
    print_message(f"the best recipe: dlm-ray train {out / 'best.yaml'}")


def print_quickstart(report: Mapping[str, Any], out: Path) -> None:
    """Print the quickstart's results, one answer, and the commands to type next."""
    table = Table(title="held-out text, bits per byte")
    for heading in ("model", "bits per byte", "95 % over documents", ""):
        table.add_column(heading)
    for name, score in report["scores"].items():
        kind = "bound" if score["is_bound"] else "exact"
        table.add_row(name, f"{score['bits_per_byte']:.3f}", _interval(score["ci95_documents"]), kind)
    for name, difference in report["paired"].items():
        interval = _interval(difference["ci95_documents_paired"], "+.3f")
        table.add_row(name.replace("_", " "), f"{difference['bits_per_byte']:+.3f}", interval, "paired")
    Console().print(table)
    answer = report["answers"][0]
    print_message(f"{answer['prompt']}")
    for name in ("base", "adapted"):
        per_call = f"{answer[name]['tokens_per_forward']:.2f} tokens per call"
        print_message(f"  {name} ({per_call}): {answer[name]['text'].strip()}")
    print_message(f"report: {out / 'report.html'}   numbers: {out / 'report.json'}")
    print_message("next:")
    for command in report["commands"]:
        print_message(f"  {command}")


def _interval(bounds: Sequence[float] | None, form: str = ".3f") -> str:
    """Return an interval over documents as text."""
    return f"{bounds[0]:{form}} to {bounds[1]:{form}}" if bounds else "none: one document"
