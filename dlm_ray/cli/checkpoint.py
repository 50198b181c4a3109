"""`dlm-ray checkpoint`, `export` and `convert`: manage a run's checkpoints; write a model as a Hugging Face folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dlm_ray.cli.arguments import Json, OurCheckpoint, RunDirectory, Weights
from dlm_ray.cli.console import print_message, show_result
from dlm_ray.config.errors import DamageError

checkpoint_app = typer.Typer(no_args_is_help=True, help="List, verify and prune the checkpoints of a run.")


def export(
    checkpoint: OurCheckpoint,
    folder: Annotated[Path, typer.Argument(help="Local folder to write; must not exist yet.", show_default=False)],
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """Export a checkpoint as a Hugging Face folder that stock transformers opens."""
    from dlm_ray.checkpoint.export import export as run

    written = run(checkpoint, str(folder), weights=weights)
    show_result({"folder": str(written)}, as_json, lambda: print_message(f"exported to {written}"))


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="GGUF file, Hugging Face folder, hub name, or checkpoint of dlm_ray.", metavar="A", show_default=False
        ),
    ],
    folder: Annotated[
        str, typer.Argument(help="Folder to write; must not exist yet.", metavar="B", show_default=False)
    ],
    weights: Weights = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16.", show_default="the dtype of A; float32 from GGUF"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert any model that dlm-ray reads into a Hugging Face folder that stock transformers opens.

    A GGUF file is dequantised, and its tokenizer and chat template are converted, too. A checkpoint of dlm_ray is
    written as by `export`. A Hugging Face folder or hub name is copied, for --dtype. To train from any of these, set
    model.base=A.
    """
    from dlm_ray.checkpoint.convert import convert as run

    written = run(source, folder, weights=weights, dtype=dtype)
    show_result({"folder": str(written)}, as_json, lambda: print_message(f"converted to {written}"))


@checkpoint_app.command("list")
def checkpoint_list(path: RunDirectory, as_json: Json = False) -> None:
    """List the committed steps of a run."""
    from dlm_ray.checkpoint.listing import committed_steps

    steps = committed_steps(path)
    show_result({"steps": steps}, as_json, lambda: sys.stdout.write("".join(f"{step}\n" for step in steps)))


@checkpoint_app.command("verify")
def checkpoint_verify(path: OurCheckpoint, as_json: Json = False) -> None:
    """Read every chunk of a checkpoint and check it; the exit code is 1 if anything is wrong."""
    from dlm_ray.checkpoint.commit import verify
    from dlm_ray.checkpoint.weights import our_checkpoint

    directory = our_checkpoint(path) or path
    errors = verify(directory)
    show_result(
        {"directory": directory, "findings": errors},
        as_json,
        lambda: None if errors else print_message(f"{directory}: every chunk is intact"),
    )
    if errors:
        raise DamageError("\n".join(errors))


@checkpoint_app.command("prune")
def checkpoint_prune(
    path: RunDirectory,
    keep_last: Annotated[int, typer.Option(help="Keep this many of the last committed steps.", min=1)] = 1,
    keep_best: Annotated[
        int, typer.Option(help="Also keep this many steps with the lowest validation nats per token.", min=0)
    ] = 0,
    keep_every: Annotated[
        int, typer.Option(help="Also keep every step that is a multiple of this; 0 keeps none.", min=0)
    ] = 0,
    as_json: Json = False,
) -> None:
    """Remove committed steps except the last ones, the best ones and regular ones."""
    from dlm_ray.checkpoint.listing import prune

    removed = prune(path, keep_last, keep_best=keep_best, keep_every_steps=keep_every)
    show_result(
        {"removed": removed},
        as_json,
        lambda: print_message(f"removed steps {removed}" if removed else "nothing to remove"),
    )
