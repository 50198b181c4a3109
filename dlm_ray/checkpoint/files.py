"""The files of a checkpoint on a disk: the byte ranges of tensors, and digests of the bytes that no checksum covers.

Every chunk, and every node of the database's index, has its own checksum. Remains of earlier index states between them
are never read. The digests cover them and the length of every file, so that no byte of a checkpoint changes unnoticed.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import tensorstore as ts
from pydantic import BaseModel, ConfigDict

from dlm_ray.checkpoint import arrays
from dlm_ray.config.errors import DamageError, UserError

_OWN_MANIFEST = "manifest.ocdbt"
# The names of the files that a save writes, possibly with the lock of an interrupted write.
_SAVED_NAME = re.compile(r"(manifest\.json|manifest\.ocdbt|probe|d|ocdbt\.process_\d+)(\.__lock)?")


class Range(NamedTuple):
    """A range of bytes of a file."""

    file: str
    """The path within the checkpoint."""
    offset: int
    length: int


class FileDigest(BaseModel):
    """The digest of one file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    num_bytes: int
    gaps: tuple[tuple[int, int], ...] = ()
    """Offset and length of the ranges that neither a chunk nor the index covers."""
    crc32: int = 0
    """The checksum of the gaps, in order."""


def digest_files(directory: str) -> dict[str, FileDigest]:
    """Remove the files that no reader needs, and return the digests of the others; empty for a remote directory."""
    if "://" in directory:
        return {}
    used: dict[str, list[Range]] = defaultdict(list)
    for _, place in _ranges(directory):
        used[place.file].append(place)
    root = Path(directory)
    digests = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name, size = str(path.relative_to(root)), path.stat().st_size
        if name not in used and name != _OWN_MANIFEST:
            path.unlink()
            continue
        gaps, end = [], 0 if name in used else size  # the database's manifest has a checksum for its whole content
        for place in sorted(used[name], key=lambda place: place.offset):
            if place.offset > end:
                gaps.append((end, place.offset - end))
            end = max(end, place.offset + place.length)
        if end < size:
            gaps.append((end, size - end))
        digests[name] = FileDigest(num_bytes=size, gaps=tuple(gaps), crc32=_checksum(path, gaps))
    return digests


def foreign(directory: str) -> list[str]:
    """Return the sorted names in a directory that no save writes, and that must not be deleted."""
    path = Path(directory)
    if "://" in directory:
        try:
            keys = (
                ts.KvStore.open(arrays.key_value_store(directory)).result().list().result(timeout=arrays.ANSWER_SECONDS)
            )
        except (ValueError, TimeoutError) as error:
            raise arrays.as_storage_error(error, directory) from error
        names = {key.decode().partition("/")[0] for key in keys}
    elif path.is_dir():
        names = {entry.name for entry in path.iterdir()}
    else:
        return [path.name] if path.exists() else []
    return sorted(name for name in names if not _SAVED_NAME.fullmatch(name))


def check_own(directory: str) -> None:
    """Check that a directory without a manifest only holds the remains of an interrupted save.

    Raises:
        UserError: if it holds anything else.
    """
    if names := foreign(directory):
        more = " and more" if len(names) > 3 else ""
        raise UserError(
            f"{directory} holds {', '.join(names[:3])}{more}, which no save writes; nothing there is deleted or "
            "overwritten: move it away, or give the run another directory"
        )


def broken(directory: str, digests: Mapping[str, FileDigest]) -> list[str]:
    """Return one line per defect of the files of a checkpoint, without reading its tensors.

    A checkpoint in a bucket is not checked here: everything that a reader reads has a checksum.
    """
    if "://" in directory:
        return []
    findings = []
    for name, expected in digests.items():
        path = Path(directory) / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected.num_bytes:
            state = "is missing" if size is None else f"has {size:,} bytes"
            findings.append(f"{path} {state}, and {expected.num_bytes:,} were written; {_contents(directory, name)}")
        elif _checksum(path, expected.gaps) != expected.crc32:
            findings.append(f"{path} is damaged between its tensors; {_contents(directory, name)}")
    return findings


def located(directory: str, error: DamageError) -> DamageError:
    """Return the error with the file of the damaged chunk added, if the error names only the chunk."""
    key = re.search(r'"([^"]+)" in OCDBT', str(error))
    if key is None or "://" in directory:
        return error
    try:
        files = [place.file for name, place in _ranges(directory) if name == key[1]]
    except ValueError:  # the index is damaged, and the error is about the index
        return error
    return DamageError(f"{error}; the chunk is in {Path(directory) / files[0]}") if files else error


def _contents(directory: str, file: str) -> str:
    """Return which tensors have chunks in a file, for a message."""
    try:
        names = sorted(
            {
                re.sub(r"/(c(/\d+)*|zarr\.json)$", "", name)
                for name, place in _ranges(directory)
                if place.file == file and name
            }
        )
    except ValueError:
        names = []
    if not names:
        return "it belongs to the index of all tensors"
    return f"it holds {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}"


def _ranges(directory: str) -> Iterator[tuple[str, Range]]:
    """Yield every node of the index (with an empty name) and every chunk (with its key) of the database."""
    base = ts.KvStore.open(arrays.key_value_store(directory)).result()
    manifest = ts.ocdbt.dump(base).result()
    for node in manifest["version_tree_nodes"]:
        yield "", _parsed(node["location"])
    for version in manifest["versions"]:
        if "root" in version:
            yield from _below(base, version["root"]["location"], "")


def _below(base: ts.KvStore, location: str, prefix: str) -> Iterator[tuple[str, Range]]:
    yield "", _parsed(location)
    for entry in ts.ocdbt.dump(base, location).result()["entries"]:
        name = prefix + _text(entry["key"])
        if "location" in entry:
            yield from _below(base, entry["location"], prefix + _text(entry.get("subtree_common_prefix", b"")))
        elif "indirect_value" in entry:
            yield name, _parsed(entry["indirect_value"])


def _text(key: bytes | str) -> str:
    return key.decode() if isinstance(key, bytes) else str(key)


def _parsed(location: str) -> Range:
    """Parse a location `value:<folder>:<file>:<offset>:<length>`."""
    _, folder, file, offset, length = location.split(":")
    return Range(folder + file, int(offset), int(length))


def _checksum(path: Path, gaps: list[tuple[int, int]] | tuple[tuple[int, int], ...]) -> int:
    checksum = 0
    if gaps:
        with path.open("rb") as file:
            for offset, length in gaps:
                file.seek(offset)
                checksum = zlib.crc32(file.read(length), checksum)
    return checksum
