"""The errors that users see as one message, without a traceback."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Self

_PARAMETER = re.compile(r"(?<![\w.\-])(?:`(\w+)`|(\w+)=)")


def reworded(message: str, names: Mapping[str, str]) -> str:
    """Return a message with parameters renamed: with {"top_p": "--top-p"}, `top_p=2` becomes `--top-p 2`."""

    def renamed(match: re.Match[str]) -> str:
        bare, assigned = match.groups()
        if (bare or assigned) not in names:
            return match.group()
        return names[bare] if bare else f"{names[assigned]} "

    return _PARAMETER.sub(renamed, message)


class UserError(ValueError):
    """A value that the user typed or passed is wrong; the message has the value, what is allowed, and what to change.

    Messages name recipe keys (`training.steps`) and Python parameters (`length_tokens`), never command-line flags. A
    parameter is written as `name=value`, or in backticks where it has no value; `worded` finds it by that.

    The command line prints the message in its own words and exits with code 2.
    """

    field: str | None = None
    """The recipe key or Python parameter that is wrong; None if the error is not about a single one."""
    value: object = None
    """The value that was refused."""
    allowed: str = ""
    """What is allowed, as a clause such as "must be more than 0 and at most 1"."""

    @classmethod
    def of(cls, field: str, value: object, allowed: str, fix: str = "") -> Self:
        """Return an error about one value, with the message `field=value: allowed; fix`.

        Args:
            field: recipe key or Python parameter.
            value: the refused value.
            allowed: a clause such as "must be one of end, entropy".
            fix: what to change, where changing `field` is not the obvious answer.
        """
        error = cls(f"{field}={value}: {allowed}" + (f"; {fix}" if fix else ""))
        error.field, error.value, error.allowed = field, value, allowed
        return error

    def worded(self, names: Mapping[str, str]) -> str:
        """Return the message with parameters renamed, as `reworded`."""
        return reworded(str(self), names)


class DamageError(UserError):
    """Stored data cannot be used, or could not be stored: the fault is of the files, not of what the user typed.

    A shard, an index, a checkpoint or a weights file is missing, damaged, incomplete or of another format, or the disk
    is full; the message names the file. The run's configuration is valid: restore the file or free the disk, and rerun
    the same command. A file that the user named and that never was one of these is a plain `UserError`.

    The command line prints the message and exits with code 1.
    """


class StorageError(UserError):
    """A storage does not answer or answers wrongly: a wrong address, or an outage that may pass. Exit code 2."""


class Stopped(Exception):
    """The run was asked to stop and has committed its state; rerunning the same command resumes it. Exit code 75."""
