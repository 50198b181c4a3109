"""`dlm-ray sweep`: run a sweep file on Ray Tune, and search the clip of a checkpoint."""

from __future__ import annotations

import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dlm_ray.cli.arguments import Checkpoint, DataFolder, Json, Weights
from dlm_ray.cli.console import print_clips, print_message, print_sweep, progress, show_result
from dlm_ray.config.errors import UserError
from dlm_ray.config.paths import local_path


class _SweepGroup(typer.core.TyperGroup):
    """A group in which `dlm-ray sweep SWEEP.yaml` means `dlm-ray sweep run SWEEP.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


class Enforce(StrEnum):
    """How a clip is enforced within a block."""

    none = "none"
    counts = "counts"


sweep_app = typer.Typer(
    cls=_SweepGroup,
    no_args_is_help=True,
    help="Find the best settings of a recipe: `dlm-ray sweep SWEEP.yaml [KEY=VALUE]...` runs a sweep file.",
)


@sweep_app.command("run")
def sweep_run(
    sweep: Annotated[
        str,
        typer.Argument(
            help="Sweep: a YAML file or a shipped name, such as sweeps/laptop/clip_by_block.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Changes to the sweep (trials_at_once=4) or to its recipe (training.steps=100).",
            metavar="[KEY=VALUE]...",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the sweep.", show_default="runs/sweeps/<name of the sweep>")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the interrupted sweep in OUT.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every corner of the space, list the trials and exit.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the trials of a sweep on Ray Tune: a table with intervals, a report and the best recipe.

    The word `run` may be left out.
    """
    from dlm_ray.config import space
    from dlm_ray.config.sweep_load import load_sweep

    loaded = load_sweep(sweep, overrides or [])
    if dry_run:
        trials = [] if loaded.sweep.search.name == "optuna" else space.trials(loaded.sweep)
        lines = "".join(f"{number}: {space.label(settings)}\n" for number, settings in enumerate(trials))
        return show_result({"trials": trials}, as_json, lambda: sys.stdout.write(lines))
    from dlm_ray.runtime.sweep.run import sweep as run

    folder = out or Path("runs/sweeps") / loaded.sweep.name
    result = run(loaded, folder, resume=resume, emit=print_message)
    show_result(result, as_json, lambda: print_sweep(result, loaded.sweep.metric, folder))


@sweep_app.command("clip-search")
def sweep_clip_search(
    checkpoint: Checkpoint,
    data: DataFolder,
    block_tokens: Annotated[
        int | None,
        typer.Option(help="Block size in tokens.", show_default="the checkpoint's block size, or its whole context"),
    ] = None,
    rows: Annotated[
        int, typer.Option("--sequences", help="Held-out sequences that every candidate is measured on.", min=1)
    ] = 64,
    draws: Annotated[int, typer.Option(help="Draws of (t, mask) per sequence.", min=1)] = 4,
    gradients: Annotated[
        int,
        typer.Option(help="Draws for the variance of the gradient, in addition (slow); 0 leaves it out.", min=0),
    ] = 0,
    enforce: Annotated[
        Enforce, typer.Option(help="`counts` keeps the masked share of every block within the clip, too.")
    ] = Enforce.none,
    out: Annotated[
        Path | None, typer.Option(help="Folder for clip_search.json and a heat map.", show_default="no files")
    ] = None,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Find the interval of mask probabilities to train a block size with: the lowest variance of the bound (BD3-LM)."""
    from dlm_ray.evaluation.sweeps import clip_search
    from dlm_ray.generation.loading import load

    if gradients == 1:
        raise UserError.of("gradients", gradients, "a variance needs at least 2 draws", "0 leaves it out")
    if out is not None:
        local_path(out, "out")
    model = load(checkpoint, weights)
    with progress("batches") as update:
        measured = clip_search.search(
            model,
            data,
            block_tokens,
            num_sequences=rows,
            num_draws=draws,
            num_gradients=gradients,
            enforce=enforce.value,
            progress=update,
        )
    trained: int = getattr(model.objective, "block_tokens", model.sequence_length)
    size = block_tokens or trained
    candidates = [asdict(clip) for clip in measured]
    fields: dict[str, Any] = {"block_tokens": size, "candidates": candidates}
    if out is not None:
        about = {"checkpoint": checkpoint, "block_tokens": size, "rows": rows, "draws": draws, "enforce": enforce.value}
        fields["files"] = [str(path) for path in clip_search.write(measured, out, about)]
    show_result(fields, as_json, lambda: print_clips(candidates, size))
