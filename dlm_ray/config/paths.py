"""Paths and URLs, told apart where they come in: what is on a local disk alone is never a folder with a URL's name."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from pathlib import Path

from dlm_ray.config.errors import UserError

# `Path` makes one slash of two, so that one counts, too. A scheme has two letters: one would be a drive.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")


def is_url(path: str | Path) -> bool:
    """Whether `path` is a URL, also one that has been through `Path`."""
    return _URL.match(str(path)) is not None


def local_path(
    path: str | Path, key: str, instead: str = "a local folder, which every worker sees under this path"
) -> Path:
    """Return `path` as a path on the local disk.

    Args:
        path: what the user gave.
        key: what he gave it as, such as `--out`.
        instead: what is allowed.

    Raises:
        UserError: if it is a URL.
    """
    if is_url(path):
        url = _URL.sub(r"\1://", str(path), count=1)
        raise UserError(
            f"{key} {url}: this is written and read on a local disk alone, and not at a URL yet; give {instead}"
        )
    return Path(path)


def folder_argument(text: str) -> Path:
    """Return an argument of a command line as a path on the local disk; a `type` of argparse, which says the option's name itself."""
    try:
        return local_path(text, "")
    except UserError as error:
        raise ArgumentTypeError(str(error).strip()) from error


def check_url(path: str, key: str) -> str:
    """Return a path that may be a URL.

    Raises:
        UserError: if it is the URL of a storage that is not supported, or has lost a slash.
    """
    if is_url(path) and not path.startswith(("s3://", "gs://")):
        raise UserError(f"{key} {path}: allowed are a local folder, s3://BUCKET/... and gs://BUCKET/...; change {key}")
    return path
