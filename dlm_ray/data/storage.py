"""Access to files on the local disk, s3:// and gs://; pyarrow, imported on demand, reads the remote ones."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from dlm_ray.config.errors import UserError
from dlm_ray.config.paths import check_url

if TYPE_CHECKING:
    from pyarrow import fs


def is_remote(path: str) -> bool:
    """Return whether `path` is a URL."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """Return the path of `name` in `folder`."""
    return f"{folder.rstrip('/')}/{name}"


def exists(path: str) -> bool:
    """Return whether `path` is an existing file."""
    if not is_remote(path):
        return Path(path).is_file()
    filesystem, inner = _remote(path)
    return bool(filesystem.get_file_info(inner).is_file)


def size(path: str) -> int | None:
    """Return the size of a file in bytes, or None if it is missing."""
    if not is_remote(path):
        return Path(path).stat().st_size if Path(path).is_file() else None
    filesystem, inner = _remote(path)
    info = filesystem.get_file_info(inner)
    return int(info.size) if info.is_file else None


def open_input(path: str) -> BinaryIO:
    """Open a file as a seekable stream of bytes."""
    if not is_remote(path):
        return open(path, "rb")
    filesystem, inner = _remote(path)
    stream: BinaryIO = filesystem.open_input_file(inner)
    return stream


def read(path: str) -> bytes:
    """Return the content of a file."""
    with open_input(path) as stream:
        return stream.read()


def write(path: str, content: bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new content, never a part."""
    if not is_remote(path):
        target = Path(check_url(path, "path"))
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(partial, 0o644)
            os.replace(partial, target)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
        return
    filesystem, inner = _remote(path)
    with filesystem.open_output_stream(inner) as stream:
        stream.write(content)


def names(folder: str) -> list[str]:
    """Return the sorted names of the files directly in `folder`; empty if the folder does not exist."""
    if not is_remote(folder):
        directory = Path(folder)
        return sorted(path.name for path in directory.iterdir() if path.is_file()) if directory.is_dir() else []
    from pyarrow import fs

    filesystem, inner = _remote(folder)
    infos = filesystem.get_file_info(fs.FileSelector(inner, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.is_file)


def _remote(path: str) -> tuple[fs.FileSystem, str]:
    """Return pyarrow's filesystem for a URL, and the path within it; AWS_ENDPOINT_URL sets another S3 endpoint."""
    from pyarrow import fs

    scheme, _, inner = path.partition("://")
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL")
        if endpoint is None:
            return fs.S3FileSystem(), inner
        protocol, _, host = endpoint.partition("://")
        return fs.S3FileSystem(
            endpoint_override=host, scheme=protocol, region=os.environ.get("AWS_REGION", "us-east-1")
        ), inner
    if scheme == "gs":
        return fs.GcsFileSystem(), inner
    raise UserError(f"{path}: {scheme}:// is not supported; use a local path, s3:// or gs://")
