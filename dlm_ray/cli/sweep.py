"""`dlm-ray sweep`: a sweep file on Ray Tune, and the clip search on a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dlm_ray.cli.arguments import Checkpoint, Json, Weights
from dlm_ray.cli.console import bar, print_clips, print_message, print_sweep, show_result
from dlm_ray.config.errors import UserError
from dlm_ray.config.paths import local_path


class _SweepGroup(typer.core.TyperGroup):
    """`dlm-ray sweep SWEEP.yaml` is `dlm-ray sweep run SWEEP.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


sweep_app = typer.Typer(
    cls=_SweepGroup,
    no_args_is_help=True,
    help="Try settings and say which is best: `dlm-ray sweep SWEEP.yaml [KEY=VALUE]...` runs a sweep file.",
)


@sweep_app.command("run")
def sweep_run(
    sweep: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a shipped sweep, such as sweeps/laptop/clip_by_block.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Changes to the sweep (trials_at_once=4) or to its recipe (training.steps=100).",
            metavar="[KEY=VALUE]...",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Where everything goes; runs/sweeps/<name> if absent.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep that OUT holds, where it was stopped.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every corner of the space, and list the trials.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Trials of a recipe side by side on Ray Tune: a table with intervals, pictures, and the best recipe. `run` may be left out."""
    from dlm_ray.config import space
    from dlm_ray.config.sweep_load import load_sweep

    loaded = load_sweep(sweep, overrides or [])
    if dry_run:
        known = [] if loaded.sweep.search.name == "optuna" else space.trials(loaded.sweep)
        lines = "".join(f"{number}: {space.label(settings)}\n" for number, settings in enumerate(known))
        return show_result({"trials": known}, as_json, lambda: sys.stdout.write(lines))
    from dlm_ray.runtime.sweep.run import sweep as run

    folder = out or Path("runs/sweeps") / loaded.sweep.name
    result = run(loaded, folder, resume=resume, emit=print_message)
    show_result(result, as_json, lambda: print_sweep(result, loaded.sweep.metric, folder))


@sweep_app.command("clip-search")
def sweep_clip_search(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Option(help="A folder that `data build` wrote with the checkpoint's tokenizer.")],
    block_tokens: Annotated[
        int | None, typer.Option(help="Size of the blocks; without it the checkpoint's own, or a whole row.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Held-out rows that every candidate is measured on.", min=1)] = 64,
    draws: Annotated[int, typer.Option(help="Draws of every row.", min=1)] = 4,
    gradients: Annotated[
        int, typer.Option(help="Draws for the variance of the gradient, beside: slow. 0 leaves it out.", min=0)
    ] = 0,
    enforce: Annotated[
        str, typer.Option(help="none, or counts: the masked share of every block is within the clip, too.")
    ] = "none",
    out: Annotated[Path | None, typer.Option(help="A folder for clip_search.json and a heat map.")] = None,
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Which interval of mask probabilities a block size should be trained with: the one whose blocks' bound varies least (BD3-LM)."""
    from dataclasses import asdict

    from dlm_ray.evaluation.sweeps import clip_search
    from dlm_ray.generation.loading import load

    if enforce not in ("none", "counts"):
        raise UserError(f"--enforce {enforce}: one of none, counts")
    if gradients == 1:
        raise UserError("--gradients 1: a variance needs at least 2 draws; 0 leaves it out")
    if out is not None:
        local_path(out, "--out")
    model = load(checkpoint, weights)
    with bar("batches") as update:
        chosen: Any = enforce
        found = clip_search.search(
            model, data, block_tokens, rows=rows, draws=draws, gradients=gradients, enforce=chosen, progress=update
        )
    trained: int = getattr(model.objective, "block_tokens", model.sequence_length)
    size = block_tokens or trained
    candidates = [asdict(one) for one in found]
    fields: dict[str, Any] = {"block_tokens": size, "candidates": candidates}
    if out is not None:
        about = {"checkpoint": checkpoint, "block_tokens": size, "rows": rows, "draws": draws, "enforce": enforce}
        fields["files"] = [str(path) for path in clip_search.write(found, out, about)]
    show_result(fields, as_json, lambda: print_clips(candidates, size))
