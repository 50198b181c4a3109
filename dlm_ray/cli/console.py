"""What people see of a verb's result: tables, sentences and progress bars, on stderr where they are not the result itself."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

# People read stderr: progress and messages. Stdout has the result alone, so that it can be piped.
console = Console(stderr=True)


def show_result(fields: dict[str, Any], as_json: bool, show: Callable[[], Any]) -> None:
    """The result of a verb: JSON on stdout, or for people."""
    if as_json:
        sys.stdout.write(json.dumps(fields, default=str) + "\n")
    else:
        show()


def print_message(message: str) -> None:
    """One message on stderr."""
    console.print(escape(message), soft_wrap=True, highlight=False)


@contextmanager
def warnings_said() -> Iterator[None]:
    """What Python warns of is said as a message, without the file that it comes from."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: print_message(f"warning: {message}")
        yield


@contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr: the caller gets update(done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def stage_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A line for every stage that ends and a bar with the time left for the one that runs: the caller gets show(stage, done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    progress.update(task, visible=False)
                tasks[stage] = progress.add_task(f"{len(tasks) + 1:>2}. {stage}", total=None)
                progress.print(f"{len(tasks):>2}. {stage} ...")
            progress.update(tasks[stage], completed=done, total=total)

        yield show


def print_mapping(title: str, fields: dict[str, Any]) -> None:
    """Names and values."""
    table = Table(title=title, show_header=False)
    for name, value in fields.items():
        table.add_row(str(name), escape(str(value)))
    Console().print(table)


def print_splits(out: str, splits: dict[str, dict[str, int]]) -> None:
    """The splits of a data folder."""
    table = Table(title=out)
    for heading in ("split", "rows", "documents", "tokens"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for name, split in splits.items():
        table.add_row(name, *(f"{split[heading]:,}" for heading in ("rows", "documents", "tokens")))
    Console().print(table)


def print_described(described: dict[str, Any]) -> None:
    """A data folder and its first rows."""
    tokenizer = described["tokenizer"]
    print_message(
        f"rows of {described['sequence_length']} tokens; tokenizer {tokenizer['name']}, {tokenizer['vocab_size']} tokens, sha256 {tokenizer['sha256'][:12]}"
    )
    print_splits(described["path"], described["splits"])
    for number, row in enumerate(described.get("first_rows", [])):
        print_message(f"row {number} of train:")
        for segment in row:
            print_message(f"  document {segment['document']}, {segment['tokens']} tokens: {segment['text'][:200]!r}")


def print_bits(scored: dict[str, Any]) -> None:
    """A likelihood with its intervals."""
    what = "at most (a bound)" if scored["is_bound"] else "exactly"
    over = scored["ci95_documents"]
    interval = (
        f"95 % over documents {over[0]:.4f} to {over[1]:.4f}"
        if over
        else "no interval over documents, which takes two with text"
    )
    print_message(
        f"{what} {scored['bits_per_byte']:.4f} bits per byte on {scored['documents']} documents, {scored['bytes']:,} bytes; {interval}"
    )
    if scored["ci95_draws"]:
        print_message(
            f"95 % over draws, given these rows: {scored['ci95_draws'][0]:.4f} to {scored['ci95_draws'][1]:.4f} ({scored['draws_per_sequence']} draws a row)"
        )


def print_clips(found: list[dict[str, Any]], block_tokens: int, shown: int = 8) -> None:
    """The best candidates of a clip search, and the full range beside them."""
    table = Table(title=f"clips for blocks of {block_tokens}, least variance first")
    for heading in ("beta", "omega", "variance of a block's bound", "masked tokens a block", "gradient variance"):
        table.add_column(heading, justify="right")
    full = [one for one in found[shown:] if one["omega"] - one["beta"] > 0.95]
    for one in [*found[:shown], *full]:
        gradient = "" if one["gradient_variance"] is None else f"{one['gradient_variance']:.4g}"
        table.add_row(
            f"{one['beta']:g}", f"{one['omega']:g}", f"{one['variance']:.4g}", f"{one['masked_tokens']:.2f}", gradient
        )
    Console().print(table)
    print_message(
        f"train with: objective.clip={{beta: {found[0]['beta']:g}, omega: {found[0]['omega']:g}, weight: paper}}"
    )


def print_sweep(result: dict[str, Any], metric: str, out: Path) -> None:
    """The trials of a sweep, the best first."""
    from dlm_ray.config.space import label

    table = Table(title=str(out))
    for heading in dict.fromkeys(("place", "settings", "status", "steps", "bits_per_byte", metric, "")):
        table.add_column(heading)
    for one in result["trials"]:
        numbers = ["" if one[name] is None else f"{one[name]:.4g}" for name in dict.fromkeys(("bits_per_byte", metric))]
        remark = "tied with the best" if one["tied"] else one["reason"]
        if one["tied"] is None and one["place"] is not None:
            remark = "no interval of its difference from the best"
        table.add_row(
            str(one["place"] or ""),
            escape(label(one["settings"])),
            one["status"],
            str(one["step"]),
            *numbers,
            escape(remark),
        )
    Console().print(table)
    print_message(
        f"the report: {out / 'report.html'}   its numbers: {out / 'results.parquet'}   the best: dlm-ray train {out / 'best.yaml'}"
    )


def print_quickstart(report: dict[str, Any], out: Path) -> None:
    """The quickstart in one table, and where to go on."""
    table = Table(title="held-out text, bits per byte")
    for heading in ("model", "bits per byte", "95 % over documents", ""):
        table.add_column(heading)
    for name in ("ar", "adapted", "scratch", "unadapted"):
        over = report[name]["ci95_documents"]
        interval = f"{over[0]:.3f} to {over[1]:.3f}" if over else "one document: none"
        table.add_row(
            name, f"{report[name]['bits_per_byte']:.3f}", interval, "bound" if report[name]["is_bound"] else "exact"
        )
    for name, baseline in (("unigram", "unigram_bits_per_byte"), ("xz -9", "xz_bits_per_byte")):
        table.add_row(name, f"{report[baseline]:.3f}", "", "baseline")
    Console().print(table)
    print_message(f"the report: {out / 'report.html'}   its numbers: {out / 'report.json'}")
    print_message(f"go on: dlm-ray sample {report['checkpoint']} --prompt 'def '")
