"""`dlm-ray checkpoint`, `export` and `convert`: manage a run's checkpoints; write a model as a Hugging Face folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dlm_ray.cli.arguments import Json, Weights
from dlm_ray.cli.console import print_message, show_result
from dlm_ray.config.errors import DamageError

checkpoint_app = typer.Typer(no_args_is_help=True, help="List, verify and prune the checkpoints of a run.")


def export(
    checkpoint: Annotated[str, typer.Argument(help="A step directory, or a run directory (its last step).")],
    folder: Annotated[Path, typer.Argument(help="A local folder that does not exist yet.")],
    weights: Weights = None,
    as_json: Json = False,
) -> None:
    """A Hugging Face folder that stock transformers opens."""
    from dlm_ray.checkpoint.export import export as run

    written = run(checkpoint, str(folder), weights=weights)
    show_result({"folder": str(written)}, as_json, lambda: print_message(f"exported to {written}"))


def convert(
    source: Annotated[
        str,
        typer.Argument(help="A GGUF file, a Hugging Face folder or hub name, or a checkpoint of ours.", metavar="A"),
    ],
    folder: Annotated[str, typer.Argument(help="A folder that does not exist yet.", metavar="B")],
    weights: Weights = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default the dtype of A, float32 from GGUF.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert any model that dlm-ray reads into a Hugging Face folder that stock transformers opens.

    From a GGUF file (its quantised weights are dequantised; tokenizer and chat template come along), from a checkpoint of ours (as
    `export` does), or from a Hugging Face folder or hub name (a copy, for --dtype). GGUF is only read; checkpoints of ours are written by
    `train` alone, which starts from any of these with model.base=A.
    """
    from dlm_ray.checkpoint.convert import convert as run

    written = run(source, folder, weights=weights, dtype=dtype)
    show_result({"folder": str(written)}, as_json, lambda: print_message(f"converted to {written}"))


@checkpoint_app.command("list")
def checkpoint_list(path: Annotated[str, typer.Argument(help="A run directory.")], as_json: Json = False) -> None:
    """The committed steps of a run."""
    from dlm_ray.checkpoint.listing import committed_steps

    steps = committed_steps(path)
    show_result({"steps": steps}, as_json, lambda: sys.stdout.write("".join(f"{step}\n" for step in steps)))


@checkpoint_app.command("verify")
def checkpoint_verify(
    path: Annotated[str, typer.Argument(help="A step directory, or a run directory (its last step).")],
    as_json: Json = False,
) -> None:
    """Reads every chunk of a checkpoint; exit code 1 if anything is wrong."""
    from dlm_ray.checkpoint.commit import verify
    from dlm_ray.checkpoint.weights import our_checkpoint

    directory = our_checkpoint(path) or path
    findings = verify(directory)
    show_result(
        {"directory": directory, "findings": findings},
        as_json,
        lambda: None if findings else print_message(f"{directory}: every chunk is good"),
    )
    if findings:
        raise DamageError("\n".join(findings))


@checkpoint_app.command("prune")
def checkpoint_prune(
    path: Annotated[str, typer.Argument(help="A run directory.")],
    keep_last: Annotated[int, typer.Option(help="The last so many committed steps stay.", min=1)] = 1,
    keep_best: Annotated[int, typer.Option(help="So do those with the fewest held-out nats a token.", min=0)] = 0,
    keep_every: Annotated[int, typer.Option(help="And every step that is a multiple of it; 0 for none.", min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Removes committed steps but the last ones, the best ones and regular ones."""
    from dlm_ray.checkpoint.listing import prune

    removed = prune(path, keep_last, keep_best=keep_best, keep_every_steps=keep_every)
    show_result(
        {"removed": removed},
        as_json,
        lambda: print_message(f"removed steps {removed}" if removed else "nothing to remove"),
    )
