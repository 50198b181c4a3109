"""Webdataset .tar shards of packed sequences; equal sequences give equal bytes."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import BinaryIO, TypedDict

import numpy as np

from dlm_ray.data import storage
from dlm_ray.data.packing import PackedSequence

FIELDS = ("document_ids", "input_ids", "num_bytes")


class ShardFields(TypedDict):
    """The entry of one shard in an index."""

    file: str
    sequences: int
    sha256: str
    size_bytes: int


def write_shard(folder: str, name: str, sequences: Sequence[PackedSequence]) -> ShardFields:
    """Write `<folder>/<name>` with one sample per sequence, whose members are `<key>.<field>.npy`.

    Returns:
        The entry of the shard in the index, without the chunk.
    """
    content = _tar(name.removesuffix(".tar"), sequences)
    storage.write(storage.join(folder, name), content)
    return {
        "file": name,
        "sequences": len(sequences),
        "sha256": hashlib.sha256(content).hexdigest(),
        "size_bytes": len(content),
    }


@dataclass(frozen=True)
class SampleLayout:
    """The offsets of a sample's arrays, which are the same for every sample of every shard."""

    stride_bytes: int
    """Bytes from one sample to the next."""
    offsets: dict[str, int]
    """By field: the offset of the array's numbers from the start of the sample."""


@cache
def sample_layout(sequence_length: int) -> SampleLayout:
    """Return the layout of samples of L tokens: for each field a header of the archive, and an .npy file of int32."""
    content = io.BytesIO()
    np.save(content, np.zeros(sequence_length, dtype=np.int32))
    size = content.tell()
    stride_bytes = tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))
    first = tarfile.BLOCKSIZE + size - 4 * sequence_length  # after both headers
    return SampleLayout(
        len(FIELDS) * stride_bytes, {field: number * stride_bytes + first for number, field in enumerate(FIELDS)}
    )


def read_sequence(stream: BinaryIO, number: int, sequence_length: int) -> dict[str, np.ndarray]:
    """Return the arrays [L] int32 of sequence `number` of a shard, by field.

    Raises:
        EOFError: if the shard ends before the sequence does.
    """
    layout = sample_layout(sequence_length)
    stream.seek(number * layout.stride_bytes)
    content = stream.read(layout.stride_bytes)
    if len(content) < layout.stride_bytes:
        raise EOFError(f"it ends within sequence {number}")
    return {
        field: np.frombuffer(content, np.dtype("<i4"), sequence_length, offset)
        for field, offset in layout.offsets.items()
    }


def _tar(prefix: str, sequences: Sequence[PackedSequence]) -> bytes:
    """Return the bytes of a shard; owner, mode and time are fixed."""
    import webdataset  # imports torch, which reading shards does without

    buffer = io.BytesIO()
    writer = webdataset.TarWriter(buffer, user="dlm_ray", group="dlm_ray", mode=0o644, mtime=0)
    for number, sequence in enumerate(sequences):
        arrays = {f"{field}.npy": getattr(sequence, field) for field in FIELDS}
        writer.write({"__key__": f"{prefix}-{number:07d}", **arrays})
    writer.close()
    return buffer.getvalue()
