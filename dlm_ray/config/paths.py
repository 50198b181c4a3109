"""Local paths and URLs: what only works on a local disk refuses URLs instead of creating folders named like them."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from pathlib import Path

from dlm_ray.config.errors import UserError

# `Path` collapses two slashes into one, so one is enough here. Schemes have at least two letters; one is a drive.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")


def is_url(path: str | Path) -> bool:
    """Return whether `path` is a URL, even one that has been converted to `Path`."""
    return _URL.match(str(path)) is not None


def local_path(
    path: str | Path, key: str, allowed: str = "a local folder, which every worker sees under this path"
) -> Path:
    """Return `path` as a path on the local disk.

    Args:
        path: given by the user.
        key: the Python parameter or recipe key that it was given as, or a phrase such as `the recipe`.
        allowed: what may be given, for the message.

    Raises:
        UserError: if it is a URL.
    """
    if is_url(path):
        url = _URL.sub(r"\1://", str(path), count=1)
        raise UserError(
            f"{_assigned(key, url)}: this is read and written on a local disk only, not at a URL; give {allowed}"
        )
    return Path(path)


def folder_argument(text: str) -> Path:
    """Return a command-line argument as a path on the local disk; a `type` for argparse, which names the option."""
    try:
        return local_path(text, "")
    except UserError as error:
        raise ArgumentTypeError(str(error).strip()) from error


def check_url(path: str, key: str) -> str:
    """Return a path that may be a URL of a supported storage.

    Args:
        path: given by the user.
        key: as for `local_path`.

    Raises:
        UserError: if it is the URL of an unsupported storage, or has lost a slash.
    """
    if is_url(path) and not path.startswith(("s3://", "gs://")):
        raise UserError(f"{_assigned(key, path)}: allowed are a local folder, s3://BUCKET/... and gs://BUCKET/...")
    return path


def _assigned(key: str, value: str) -> str:
    """Return `key=value` for a parameter or recipe key, else `key value`."""
    is_parameter = key.replace(".", "_").isidentifier() and key.islower()
    return f"{key}={value}" if is_parameter else f"{key} {value}"
