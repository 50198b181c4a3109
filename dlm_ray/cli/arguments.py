"""Arguments that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Checkpoint = Annotated[
    str,
    typer.Argument(
        help="A step directory or a run directory (its last step), local, s3:// or gs://; a Hugging Face folder, a hub "
        "name or a GGUF file."
    ),
]
Weights = Annotated[str | None, typer.Option(help="`ema` or `raw`; by default `ema` if the run kept an average.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, such as training.steps=100.", metavar="[KEY=VALUE]..."),
]
