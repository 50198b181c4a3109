"""The verbs of `sweep`: settings are tried, and which is best is said."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dlm_ray.config.errors import UserError
from dlm_ray.console import bar, print_clips, show_result

sweep_app = typer.Typer(no_args_is_help=True, help="Try settings and say which is best.")


@sweep_app.callback()
def _group() -> None:
    """Try settings and say which is best."""


@sweep_app.command("clip-search")
def clip_search(
    checkpoint: Annotated[
        str, typer.Argument(help="A step directory, a run directory (its last step), a Hugging Face folder or a hub name.")
    ],
    data: Annotated[str, typer.Option(help="A folder that `data build` wrote with the checkpoint's tokenizer.")],
    block_tokens: Annotated[int | None, typer.Option(help="Size of the blocks; without it the checkpoint's own, or a whole row.")] = None,
    rows: Annotated[int, typer.Option(help="Held-out rows that every candidate is measured on.", min=1)] = 64,
    draws: Annotated[int, typer.Option(help="Draws of every row.", min=1)] = 4,
    gradients: Annotated[int, typer.Option(help="Draws for the variance of the gradient, beside: slow. 0 leaves it out.", min=0)] = 0,
    enforce: Annotated[str, typer.Option(help="none, or counts: the masked share of every block is within the clip, too.")] = "none",
    out: Annotated[Path | None, typer.Option(help="A folder for clip_search.json and a heat map.")] = None,
    weights: Annotated[str | None, typer.Option(help="ema or raw; the average if the run kept one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Which interval of mask probabilities a block size should be trained with: the one whose blocks' bound varies least (BD3-LM)."""
    from dataclasses import asdict

    from dlm_ray.evaluation import clip_search as searching
    from dlm_ray.serving.loading import load

    if enforce not in ("none", "counts"):
        raise UserError(f"--enforce {enforce}: one of none, counts")
    if gradients == 1:
        raise UserError("--gradients 1: a variance needs at least 2 draws; 0 leaves it out")
    model = load(checkpoint, weights)
    with bar("batches") as update:
        chosen: Any = enforce
        found = searching.search(model, data, block_tokens, rows=rows, draws=draws, gradients=gradients, enforce=chosen, progress=update)
    trained: int = getattr(model.objective, "block_tokens", model.row_tokens)
    size = block_tokens or trained
    candidates = [asdict(one) for one in found]
    fields: dict[str, Any] = {"block_tokens": size, "candidates": candidates}
    if out is not None:
        about = {"checkpoint": checkpoint, "block_tokens": size, "rows": rows, "draws": draws, "enforce": enforce}
        fields["files"] = [str(path) for path in searching.write(found, out, about)]
    show_result(fields, as_json, lambda: print_clips(candidates, size))
