"""The files of a checkpoint on a disk: which bytes of which file a tensor lies in, and a seal on what no tensor's checksum covers.

A chunk carries its own checksum, and so does a node of the database's index. What an earlier state of the index left between them is
read by nobody; it is sealed all the same, with every file's length, so that no byte of a checkpoint changes unnoticed.
"""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tensorstore as ts
from pydantic import BaseModel, ConfigDict

from dlm_ray.checkpoint import arrays
from dlm_ray.config.errors import DamageError, UserError

_OWN_MANIFEST = "manifest.ocdbt"
# The names that a save gives to what it writes into its directory, each perhaps with the lock of a write that was cut short.
_SAVED_NAME = re.compile(r"(manifest\.json|manifest\.ocdbt|probe|d|ocdbt\.process_\d+)(\.__lock)?")


class Range(NamedTuple):
    """Bytes of a file."""

    file: str
    """Within the checkpoint."""
    offset: int
    length: int


class FileDigest(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    num_bytes: int
    gaps: tuple[tuple[int, int], ...] = ()
    """Offset and length of what neither a chunk nor the index lies in."""
    crc32: int = 0
    """Of the gaps, one after the other."""


def digest_files(directory: str) -> dict[str, FileDigest]:
    """Removes the files that no reader needs, and seals the others; empty for a remote directory, whose files have no gaps that can be read apart."""
    if "://" in directory:
        return {}
    used: dict[str, list[Range]] = defaultdict(list)
    for _, place in _ranges(directory):
        used[place.file].append(place)
    root = Path(directory)
    sealed = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name, size = str(path.relative_to(root)), path.stat().st_size
        if name not in used and name != _OWN_MANIFEST:
            path.unlink()
            continue
        gaps, end = [], 0 if name in used else size  # the database's own manifest has a checksum over all of it
        for place in sorted(used[name], key=lambda place: place.offset):
            if place.offset > end:
                gaps.append((end, place.offset - end))
            end = max(end, place.offset + place.length)
        if end < size:
            gaps.append((end, size - end))
        sealed[name] = FileDigest(num_bytes=size, gaps=tuple(gaps), crc32=_checksum(path, gaps))
    return sealed


def foreign(directory: str) -> list[str]:
    """Return the names in a directory that no save writes, sorted: whoever put them there, they are not ours to delete."""
    path = Path(directory)
    if "://" in directory:
        try:
            keys = (
                ts.KvStore.open(arrays.key_value_store(directory)).result().list().result(timeout=arrays.ANSWER_SECONDS)
            )
        except (ValueError, TimeoutError) as error:
            raise arrays.refusal(error, directory) from error
        names = {key.decode().partition("/")[0] for key in keys}
    elif path.is_dir():
        names = {entry.name for entry in path.iterdir()}
    else:
        return [path.name] if path.exists() else []
    return sorted(name for name in names if not _SAVED_NAME.fullmatch(name))


def check_own(directory: str) -> None:
    """Check that a directory without a manifest holds nothing but what a save that was cut short left there.

    Raises:
        UserError: if it holds anything else.
    """
    if names := foreign(directory):
        more = " and more" if len(names) > 3 else ""
        raise UserError(
            f"{directory} holds {', '.join(names[:3])}{more}, which no checkpoint has; nothing there is deleted or overwritten: "
            "move it away, or give the run another directory"
        )


def broken(directory: str, seals: Mapping[str, FileDigest]) -> list[str]:
    """What is wrong with the files of a checkpoint, one line each, without reading its tensors.

    Of a checkpoint that was copied to a bucket nothing is found here: what is read of it has checksums, and no part of a file is read alone.
    """
    if "://" in directory:
        return []
    findings = []
    for name, expected in seals.items():
        path = Path(directory) / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected.num_bytes:
            has = "is missing" if size is None else f"has {size:,} bytes"
            findings.append(f"{path} {has}, and {expected.num_bytes:,} were written; {_held(directory, name)}")
        elif _checksum(path, expected.gaps) != expected.crc32:
            findings.append(f"{path} is damaged between the tensors that it holds; {_held(directory, name)}")
    return findings


def located(directory: str, error: DamageError) -> DamageError:
    """The same error with the file of the chunk that it speaks of, if it does not name one."""
    key = re.search(r'"([^"]+)" in OCDBT', str(error))
    if key is None or "://" in directory:
        return error
    try:
        files = [place.file for name, place in _ranges(directory) if name == key[1]]
    except ValueError:  # the index is what is damaged, and the error speaks of it
        return error
    return DamageError(f"{error}; the chunk lies in {Path(directory) / files[0]}") if files else error


def _held(directory: str, file: str) -> str:
    """Whose chunks lie in a file."""
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
    return (
        f"it holds {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}"
        if names
        else "it belongs to the index of all tensors"
    )


def _ranges(directory: str) -> Iterator[tuple[str, Range]]:
    """Every node of the index (with an empty name) and every chunk (with its key) that the database refers to."""
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


def _text(key: Any) -> str:
    return key.decode() if isinstance(key, bytes) else str(key)


def _parsed(location: str) -> Range:
    """`value:<folder>:<file>:<offset>:<length>`."""
    _, folder, file, offset, length = location.split(":")
    return Range(folder + file, int(offset), int(length))


def _checksum(path: Path, gaps: list[tuple[int, int]] | tuple[tuple[int, int], ...]) -> int:
    found = 0
    if gaps:
        with path.open("rb") as file:
            for offset, length in gaps:
                file.seek(offset)
                found = zlib.crc32(file.read(length), found)
    return found
