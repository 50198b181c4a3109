"""Rows -> .tar shards of webdataset samples; the same rows give the same bytes, and any webdataset reader reads them."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import webdataset

from dlm_ray.data import storage
from dlm_ray.data.packing import PackedRow

FIELDS = ("document_ids", "input_ids", "num_bytes")


def write_shard(folder: str, name: str, rows: Sequence[PackedRow]) -> dict[str, Any]:
    """Writes `<folder>/<name>`, a sample a row with members `<key>.<field>.npy`.

    Returns:
        file, rows, sha256 and size_bytes, as in the index.
    """
    content = _tar(name.removesuffix(".tar"), rows)
    storage.write(storage.join(folder, name), content)
    return {"file": name, "rows": len(rows), "sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}


def row_stride_bytes(row_tokens: int) -> int:
    """Bytes that one row takes in a shard: its arrays have fixed types and shapes, so that all rows take as many."""
    blank = PackedRow(np.zeros(row_tokens, np.int32), np.zeros(row_tokens, np.int32), np.zeros(row_tokens, np.int32))
    with tarfile.open(fileobj=io.BytesIO(_tar("x", [blank, blank])), mode="r:") as archive:
        return archive.getmembers()[len(FIELDS)].offset


def read_row(stream: BinaryIO, row: int, stride: int) -> dict[str, np.ndarray]:
    """The arrays of row number `row` of a shard, by field."""
    stream.seek(row * stride)
    arrays = {}
    with tarfile.open(fileobj=io.BytesIO(stream.read(stride)), mode="r:") as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None, f"{member.name} is no file"
            arrays[member.name.split(".")[1]] = np.load(io.BytesIO(content.read()), allow_pickle=False)
    return arrays


def _tar(prefix: str, rows: Sequence[PackedRow]) -> bytes:
    buffer = io.BytesIO()
    writer = webdataset.TarWriter(buffer, user="dlm_ray", group="dlm_ray", mode=0o644, mtime=0)
    for number, row in enumerate(rows):
        writer.write({"__key__": f"{prefix}-{number:07d}", **{f"{field}.npy": getattr(row, field) for field in FIELDS}})
    writer.close()
    return buffer.getvalue()
