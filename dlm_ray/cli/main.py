"""The command line `dlm-ray`: every verb, and the exit codes.

Exit code 0 means success, 2 a mistake in what was typed, 75 a run that was asked to stop, 1 any other failure.
Verbs import torch and Ray only when they run, so that `dlm-ray --help` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.markup import escape

from dlm_ray.cli.checkpoint import checkpoint_app, convert, export
from dlm_ray.cli.console import console
from dlm_ray.cli.data import data_app
from dlm_ray.cli.generate import evaluate, sample
from dlm_ray.cli.machine import doctor, schema
from dlm_ray.cli.serve import serve
from dlm_ray.cli.sweep import sweep_app
from dlm_ray.cli.train import quickstart, train
from dlm_ray.config.errors import DamageError, Stopped, UserError

# The parser's own complaint, whichever copy of click typer brings.
_Usage: Any = typer.BadParameter.__mro__[1]

app = typer.Typer(
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
app.command("eval")(evaluate)
app.command()(export)
app.command()(convert)
app.add_typer(checkpoint_app, name="checkpoint")
app.command()(serve)
app.command()(schema)
app.command()(doctor)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """Options before the verb; `main` reads --debug itself."""


def main() -> None:
    """The console script."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        outcome = app([argument for argument in arguments if argument != "--debug"], standalone_mode=False)
        sys.exit(outcome if isinstance(outcome, int) else 0)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except _Usage as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:  # the last place where anything can be said
        if debug:
            raise
        sys.exit(_fail(error))


def _fail(error: Exception) -> int:
    """Prints what a person needs of an error; its exit code."""
    if isinstance(error, Stopped):
        console.print(f"[yellow]stopped:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 75
    if isinstance(error, DamageError):
        console.print(f"[red]damaged:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 1
    if isinstance(error, UserError):
        console.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        return 2
    console.print(
        f"[red]failed:[/] {escape(f'{type(error).__name__}: {error}')}\nRun again as `dlm-ray --debug ...` for the traceback.",
        soft_wrap=True,
        highlight=False,
    )
    return 1
