"""The command line `dlm-ray`: its commands, how errors are printed, and the exit codes.

Exit codes: 0 success, 2 a mistake in what the user typed, 75 a run that was asked to stop, 130 Ctrl-C, 1 any other
failure.
Commands import torch and Ray only when they run, which keeps `dlm-ray --help` fast.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer

from dlm_ray.cli.chat import chat
from dlm_ray.cli.checkpoint import checkpoint_app, convert, export
from dlm_ray.cli.console import print_message, set_log_format, warnings_printed
from dlm_ray.cli.data import data_app
from dlm_ray.cli.generate import evaluate, sample
from dlm_ray.cli.machine import doctor, schema
from dlm_ray.cli.serve import serve
from dlm_ray.cli.sweep import sweep_app
from dlm_ray.cli.train import quickstart, train
from dlm_ray.config.errors import DamageError, Stopped, UserError


class _RootGroup(typer.core.TyperGroup):
    """The group of all commands. After Ctrl-C it exits with 130, as shells expect."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_RootGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Turn an autoregressive language model into a diffusion language model, on one laptop or on a Ray cluster.",
)
app.command()(quickstart)
app.add_typer(data_app, name="data")
app.command()(train)
app.add_typer(sweep_app, name="sweep")
app.command()(sample)
app.command()(chat)
app.command("eval")(evaluate)
app.command()(export)
app.command()(convert)
app.add_typer(checkpoint_app, name="checkpoint")
app.command()(serve)
app.command()(schema)
app.command()(doctor)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, and Ray's own messages.")] = False,
) -> None:
    """Declare the options that stand before the command; `main` reads --debug itself, at any position."""


def main() -> None:
    """Run the command line; the console script calls this."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    logging.getLogger("dlm_ray").setLevel(logging.DEBUG if debug else logging.NOTSET)
    set_log_format("text")
    try:
        with warnings_printed(_flags):
            app(arguments)  # prints usage errors and exits by itself
    except Exception as error:
        if debug:
            raise
        sys.exit(_fail(error))


def _fail(error: Exception) -> int:
    """Print an error for the user and return the exit code."""
    if isinstance(error, Stopped):
        label, message, code = "stopped", str(error), 75
    elif isinstance(error, DamageError):
        label, message, code = "damaged", error.worded(_flags()), 1
    elif isinstance(error, UserError):
        label, message, code = "error", error.worded(_flags()), 2
    else:
        hint = "Run again as `dlm-ray --debug ...` for the traceback."
        label, message, code = "failed", f"{type(error).__name__}: {error}\n{hint}", 1
    print_message(message, label=label)
    return code


def _flags() -> dict[str, str]:
    """Map the parameters of all commands, named like those of the Python functions, to their flags."""
    flags: dict[str, str] = {}
    commands = [typer.main.get_command(app)]
    while commands:
        command: Any = commands.pop()
        commands += getattr(command, "commands", {}).values()
        flags |= {parameter.name: parameter.opts[0] for parameter in command.params if parameter.opts[0][:2] == "--"}
    return flags
