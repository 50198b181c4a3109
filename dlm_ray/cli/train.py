"""`dlm-ray train` and `dlm-ray quickstart`: one run on Ray, and the whole path from text to a diffusion model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dlm_ray.cli.arguments import Json, Overrides
from dlm_ray.cli.console import bar, print_message, print_quickstart, show_result, stage_bar


def quickstart(
    overrides: Overrides = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Everything in two minutes with a few steps: does it run here?")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/quickstart"),
    as_json: Json = False,
) -> None:
    """The whole main job on this machine: data, an AR base, its adaptation, the bound, samples, infilling, export, a report."""
    from dlm_ray.runtime.quickstart import quickstart as run

    with stage_bar() as show:
        report = run(out, smoke=smoke, overrides=overrides or [], show=show)
    show_result(report, as_json, lambda: print_quickstart(report, out))


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="A local folder; the run directory is OUT/<name>-<hash>.")] = Path("runs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start another run beside one that is there.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe and print it, with all defaults.")
    ] = False,
    as_json: Json = False,
) -> None:
    """One run on Ray. The same command resumes a run that was interrupted; a finished one says so. SIGTERM commits and exits with 75."""
    from dlm_ray.config.load import load_recipe

    checked = load_recipe(recipe, overrides or [])
    if dry_run:
        import yaml

        whole = checked.model_dump(mode="json")
        return show_result(whole, as_json, lambda: sys.stdout.write(yaml.safe_dump(whole, sort_keys=False)))
    from dlm_ray.runtime.train import fit

    with bar("steps") as update:
        result = fit(checked, out, fresh=fresh, on_event=lambda event: update(event["step"], checked.training.steps))
    fields = {**vars(result), "run_dir": str(result.run_dir)}
    what = "was finished before" if result.already_finished else "is finished"
    bits = result.metrics.get("validation", {}).get("bits_per_byte")
    show_result(
        fields,
        as_json,
        lambda: print_message(
            f"{checked.name} {what}: {result.checkpoint}"
            + (f", {bits:.3f} bits per byte on held-out rows" if bits else "")
        ),
    )
