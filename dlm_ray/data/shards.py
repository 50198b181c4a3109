"""Rows -> .tar shards of webdataset samples; the same rows give the same bytes, and any webdataset reader reads them."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO

import numpy as np
import webdataset

from dlm_ray.data import storage
from dlm_ray.data.packing import PackedSequence

FIELDS = ("document_ids", "input_ids", "num_bytes")


def write_shard(folder: str, name: str, rows: Sequence[PackedSequence]) -> dict[str, Any]:
    """Writes `<folder>/<name>`, a sample a row with members `<key>.<field>.npy`.

    Returns:
        file, rows, sha256 and size_bytes, as in the index.
    """
    content = _tar(name.removesuffix(".tar"), rows)
    storage.write(storage.join(folder, name), content)
    return {"file": name, "rows": len(rows), "sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}


@dataclass(frozen=True)
class SampleLayout:
    """Where the arrays of a row lie: they have fixed types and shapes, so that every row of every shard is laid out alike."""

    stride_bytes: int
    offsets: dict[str, int]
    """Of each array's numbers from the beginning of the row."""


@cache
def row_layout(sequence_length: int) -> SampleLayout:
    """The layout of rows of L tokens, read off a shard of two."""
    blank = PackedSequence(*(np.zeros(sequence_length, np.int32) for _ in FIELDS))
    with tarfile.open(fileobj=io.BytesIO(_tar("x", [blank, blank])), mode="r:") as archive:
        members = archive.getmembers()
    offsets = {
        member.name.split(".")[1]: member.offset_data + member.size - 4 * sequence_length
        for member in members[: len(FIELDS)]
    }
    return SampleLayout(members[len(FIELDS)].offset, offsets)


def read_row(stream: BinaryIO, row: int, sequence_length: int) -> dict[str, np.ndarray]:
    """The arrays [L] int32 of row number `row` of a shard, by field.

    Raises:
        EOFError: if the shard ends before the row does.
    """
    layout = row_layout(sequence_length)
    stream.seek(row * layout.stride_bytes)
    content = stream.read(layout.stride_bytes)
    if len(content) < layout.stride_bytes:
        raise EOFError(f"it ends within row {row}")
    return {
        field: np.frombuffer(content, np.dtype("<i4"), sequence_length, offset)
        for field, offset in layout.offsets.items()
    }


def _tar(prefix: str, rows: Sequence[PackedSequence]) -> bytes:
    buffer = io.BytesIO()
    writer = webdataset.TarWriter(buffer, user="dlm_ray", group="dlm_ray", mode=0o644, mtime=0)
    for number, row in enumerate(rows):
        writer.write({"__key__": f"{prefix}-{number:07d}", **{f"{field}.npy": getattr(row, field) for field in FIELDS}})
    writer.close()
    return buffer.getvalue()
