"""The command line, called in this process."""

import contextlib
import io
import sys
import traceback
from dataclasses import dataclass
from unittest import mock


@dataclass(frozen=True)
class Finished:
    """The exit code and the output of a command."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def message(self):
        """Return stderr as one line."""
        return " ".join(self.stderr.split())


def dlm_ray(*arguments):
    """Run `dlm-ray arguments` in this process; return its exit code and output."""
    from dlm_ray.cli.main import main

    stdout, stderr = io.StringIO(), io.StringIO()
    code = 0
    with (
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        mock.patch.object(sys, "argv", ["dlm-ray", *map(str, arguments)]),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        except Exception:  # the interpreter prints it and exits with 1
            traceback.print_exc()
            code = 1
    return Finished(code, stdout.getvalue(), stderr.getvalue())
