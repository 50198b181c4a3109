"""One tensor as a zarr3 array in an OCDBT database: specifications, and reading and writing of one region.

Every chunk has a crc32c. Chunks of zeros are written, too, and a missing chunk is an error, so that damage never goes
unnoticed.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import shutil
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar

import ml_dtypes
import numpy as np
import tensorstore as ts
import torch
from torch import Tensor

from dlm_ray.config.errors import DamageError, StorageError, UserError
from dlm_ray.config.paths import check_url

DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

CHUNK_BYTES = 4 * 2**20
# Memory that a load uses in addition to the tensors that it fills: one chunk for a local disk, several for a remote
# store, whose every answer takes a round trip.
LOCAL_READ_BYTES = CHUNK_BYTES
REMOTE_READ_BYTES = 8 * CHUNK_BYTES
# A storage that has not answered one small request after this time is unreachable.
ANSWER_SECONDS = 30
_MIN_FREE_BYTES = 2**20
_DATABASE = {"manifest_kind": "single", "max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000}

Result = TypeVar("Result")
Spec = dict[str, object]
"""A specification of tensorstore, in JSON."""


def wait(work: Coroutine[None, None, Result]) -> Result:
    """Run `work` to its end, in a thread of its own: the caller's thread may run an event loop, as a server's does."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, work).result()


def context(*, one_at_a_time: bool = False) -> ts.Context:
    """Return the concurrency of a save or load; one at a time saves memory, as allocators keep chunks per thread."""
    files, copies = (1, 1) if one_at_a_time else (32, 2)
    concurrency = {"file_io_concurrency": {"limit": files}, "data_copy_concurrency": {"limit": copies}}
    return ts.Context({**concurrency, "cache_pool": {"total_bytes_limit": 0}})


def key_value_store(path: str) -> Spec:
    """Return tensorstore's specification of a directory; AWS_ENDPOINT_URL sets another S3 endpoint.

    Raises:
        UserError: if the scheme is another one.
    """
    check_url(path, "path")
    if "://" not in path:
        return {"driver": "file", "path": os.path.abspath(path).rstrip("/") + "/"}
    scheme, _, rest = path.partition("://")
    bucket, _, inner = rest.partition("/")
    inner = inner.rstrip("/") + "/" if inner else ""
    if scheme == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": inner}
    # Few retries, so that an unreachable endpoint is an error within seconds.
    spec: Spec = {
        "driver": "s3",
        "bucket": bucket,
        "path": inner,
        "s3_request_retries": {"max_retries": 3, "initial_delay": "100ms", "max_delay": "1s"},
    }
    if "AWS_ENDPOINT_URL" in os.environ:
        spec |= {"endpoint": os.environ["AWS_ENDPOINT_URL"], "aws_region": os.environ.get("AWS_REGION", "us-east-1")}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def below(store: Spec, name: str) -> Spec:
    """Return the specification of the directory `name` within a directory."""
    return {**store, "path": f"{store['path']}{name}/"}


def database(base: Spec, name: str = "") -> Spec:
    """Return the OCDBT database in the directory `base`, at the array `name` (a prefix of its keys)."""
    return {
        "driver": "ocdbt",
        "base": base,
        "path": f"{name}/" if name else "",
        "assume_config": True,
        "target_data_file_size": 2**31,
        "config": _DATABASE,
    }


def chunk_shape(write_shape: Sequence[int], itemsize: int) -> list[int]:
    """Return the chunk shape of an array written in blocks of `write_shape`: a divisor of it, of a few megabytes.

    Chunks are smaller than a rank's block, so that another number of ranks reads little more than its own regions.
    """
    chunk = [max(1, size) for size in write_shape]
    for dimension in range(len(chunk)):
        while int(np.prod(chunk)) * itemsize > CHUNK_BYTES and chunk[dimension] > 1:
            chunk[dimension] //= next(
                factor for factor in range(2, chunk[dimension] + 1) if chunk[dimension] % factor == 0
            )
    return chunk


def keys(name: str, shape: Sequence[int], chunk: Sequence[int]) -> set[str]:
    """Return the keys of an array in its database: the metadata and every chunk."""
    grid = [range(-(-size // length)) for size, length in zip(shape, chunk, strict=True)]
    return {f"{name}/zarr.json"} | {"/".join([name, "c", *map(str, index)]) for index in itertools.product(*grid)}


def create_spec(store: Spec, shape: Sequence[int], chunk: Sequence[int], dtype: torch.dtype) -> Spec:
    """Return the specification of an array that is created if it does not exist."""
    return {
        "driver": "zarr3",
        "kvstore": store,
        "metadata": {
            "shape": list(shape),
            "data_type": DTYPES[dtype],
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        },
        "store_data_equal_to_fill_value": True,
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
    }


def open_spec(store: Spec) -> Spec:
    """Return the specification of an array that must exist, with all its chunks."""
    return {
        "driver": "zarr3",
        "kvstore": store,
        "fill_missing_data_reads": False,
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
    }


def as_numpy(tensor: Tensor) -> np.ndarray:
    """Return a numpy view that shares the memory of a CPU tensor; bfloat16 is supported."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def region(offset: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the index of a block in its array."""
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


async def write_region(spec: Spec, tensor: Tensor, offset: Sequence[int], shared: ts.Context) -> int:
    """Write a CPU tensor at `offset` of the array, wait for the commit, and return the number of bytes.

    The array is created if it does not exist. The tensor must not change before the commit.
    """
    array = await ts.open(spec, create=True, open=True, context=shared)
    if tensor.numel() == 0:
        return 0
    # The tensor does not change before the commit, so tensorstore needs no copy.
    await (
        array[region(offset, tensor.shape)].write(as_numpy(tensor), can_reference_source_data_indefinitely=True).commit
    )
    return tensor.numel() * tensor.element_size()


class Budget:
    """A limit on the bytes in flight of a load, in addition to the tensors that it fills; for one event loop."""

    def __init__(self, total_bytes: int = LOCAL_READ_BYTES):
        self._total = self._left = total_bytes
        self._changed = asyncio.Condition()
        self._buffers: list[Tensor] = []

    def buffer(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return host memory for a piece, from reused buffers: allocators keep what many threads free in pieces."""
        num_bytes = math.prod(shape) * dtype.itemsize
        flat = (
            self._buffers.pop()
            if self._buffers and num_bytes <= CHUNK_BYTES
            else torch.empty(max(num_bytes, CHUNK_BYTES), dtype=torch.uint8)
        )
        return flat[:num_bytes].view(dtype).reshape(tuple(shape))

    def give_back(self, buffer: Tensor) -> None:
        """Return a buffer, so that it can be filled again."""
        self._buffers.append(torch.empty(0, dtype=torch.uint8).set_(buffer.untyped_storage()))

    @asynccontextmanager
    async def reserve(self, num_bytes: int) -> AsyncIterator[None]:
        """Wait until `num_bytes` are free, and hold them; a piece larger than the limit waits for all of it."""
        taken = min(num_bytes, self._total)
        async with self._changed:
            await self._changed.wait_for(lambda: self._left >= taken)
            self._left -= taken
        try:
            yield
        finally:
            async with self._changed:
                self._left += taken
                self._changed.notify_all()


def pieces(
    offset: Sequence[int], shape: Sequence[int], chunk: Sequence[int], itemsize: int
) -> Iterator[tuple[slice, ...]]:
    """Divide a block into pieces of a few megabytes along the chunks of the array, so that each chunk is read once.

    Yields:
        The index of a piece within the block.
    """
    sizes = [min(length, size) for length, size in zip(chunk, shape, strict=True)]
    # Small chunks are combined, first along the last dimension, which is contiguous in memory.
    for dimension in reversed(range(len(sizes))):
        others = math.prod(sizes) // max(1, sizes[dimension]) * itemsize
        fit = max(1, CHUNK_BYTES // max(1, others * chunk[dimension])) * chunk[dimension]
        sizes[dimension] = min(shape[dimension], max(sizes[dimension], fit))
    cuts = []
    for start, length, size, chunk_length in zip(offset, shape, sizes, chunk, strict=True):
        whole = max(chunk_length, size // chunk_length * chunk_length)
        edges = [start, *range((start // whole + 1) * whole, start + length, whole), start + length]
        cuts.append([slice(low - start, high - start) for low, high in itertools.pairwise(edges)])
    return itertools.product(*cuts)


async def read_region(
    spec: Spec,
    tensor: Tensor,
    offset: Sequence[int],
    stored: torch.dtype,
    chunk: Sequence[int],
    budget: Budget,
    shared: ts.Context,
) -> None:
    """Fill a tensor on any device from `offset` of the array, by a small buffer if not in place."""
    array = await ts.open(spec, context=shared)
    if tensor.numel() == 0:
        return

    async def read(piece: tuple[slice, ...]) -> None:
        target = tensor[piece]
        async with budget.reserve(target.numel() * stored.itemsize):
            in_place = target.device.type == "cpu" and target.dtype == stored
            buffer = target if in_place else budget.buffer(target.shape, stored)
            source = array[
                tuple(slice(start + cut.start, start + cut.stop) for start, cut in zip(offset, piece, strict=True))
            ]
            if target.dim():
                source = source[ts.d[:].translate_to[0]]
            await ts.array(as_numpy(buffer)).write(source)
            if not in_place:
                target.copy_(buffer)
                budget.give_back(buffer)

    reads = [read(piece) for piece in pieces(offset, tensor.shape, chunk, stored.itemsize)]
    for failure in await asyncio.gather(*reads, return_exceptions=True):
        if isinstance(failure, BaseException):
            raise failure


def as_user_error(error: ValueError | TimeoutError, subject: str) -> UserError:
    """Return the UserError for an error of tensorstore, which raises ValueError with the kind as a prefix.

    It is a StorageError for a storage that does not answer, and a DamageError for anything else.
    """
    kind = str(error).partition(":")[0]
    is_out_of_reach = kind in ("ABORTED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED")
    if _is_full(error) or is_out_of_reach or isinstance(error, TimeoutError) or "NoSuchBucket" in str(error):
        return as_storage_error(error, subject)
    return DamageError(f"{subject}: damaged or incomplete ({_cause(error)})")


def as_storage_error(error: ValueError | OSError, subject: str) -> UserError:
    """Return the DamageError for a full disk, or the StorageError for a storage that does not answer as it should."""
    if _is_full(error):
        return DamageError(
            f"{subject}: no space left ({_cause(error)}); free some and run the same command again, the previous "
            "checkpoint is intact"
        )
    return StorageError(
        f"{subject}: the storage does not answer as it should ({_cause(error)}); check the path, the endpoint and the "
        "credentials"
    )


def check_room(directory: str, needed_bytes: int) -> None:
    """Raise DamageError if a local disk has too little room for a checkpoint of `needed_bytes`."""
    needed = needed_bytes + needed_bytes // 50 + _MIN_FREE_BYTES  # checksums, databases and the manifest need more
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DamageError(
            f"{directory}: no space left for a checkpoint of {needed / 2**20:,.0f} MiB, the disk has "
            f"{free / 2**20:,.0f} MiB free; free some, or lower checkpoint.keep_last, and run the same command again; "
            "the previous checkpoint is intact"
        )


def _is_full(error: Exception) -> bool:
    message = str(error)
    return message.startswith("RESOURCE_EXHAUSTED") or any(
        text in message for text in ("No space left", "quota exceeded", "File too large")
    )


def _cause(error: Exception) -> str:
    return (str(error) or f"no answer within {ANSWER_SECONDS} seconds").splitlines()[0]
