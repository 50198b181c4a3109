"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from dlm_ray.cli.console import LogFormat, set_log_format
from dlm_ray.config.errors import UserError


def _set_log_format(name: str) -> str:
    """Apply `--log` before the command runs.

    Raises:
        UserError: if there is no such format.
    """
    if name not in ("text", "json"):
        raise UserError.of("log", name, "must be text or json")
    set_log_format(cast(LogFormat, name))
    return name


Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Log = Annotated[
    str,
    typer.Option(
        "--log",
        help="Format of messages and progress on stderr: text, or json (one object per line).",
        metavar="text|json",
        callback=_set_log_format,
    ),
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        help="Step directory or run directory (its last step), local, s3:// or gs://; Hugging Face folder, hub name or "
        "GGUF file.",
        show_default=False,
    ),
]
OurCheckpoint = Annotated[
    str, typer.Argument(help="Step directory, or run directory (its last step).", show_default=False)
]
RunDirectory = Annotated[str, typer.Argument(help="Run directory.", show_default=False)]
Weights = Annotated[
    str | None,
    typer.Option(help="Weights of a checkpoint: `ema` or `raw`.", show_default="ema if the run kept an average"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Changes to the recipe, such as training.steps=100; `dlm-ray schema recipe` describes all keys.",
        metavar="[KEY=VALUE]...",
        show_default=False,
    ),
]
Watch = Annotated[
    bool, typer.Option("--watch", help="Show every step of the (first) text: masked, new and settled tokens.")
]
Save = Annotated[
    Path | None,
    typer.Option(help="Record the steps of the (last) text to FILE.html or FILE.gif.", metavar="FILE"),
]
DataFolder = Annotated[
    str, typer.Option("--data", help="Folder that `data build` wrote with the checkpoint's tokenizer.")
]
