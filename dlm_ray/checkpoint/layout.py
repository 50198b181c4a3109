"""The block of a tensor that this rank holds, and the check that the blocks of all ranks cover the tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dlm_ray.checkpoint import arrays

Region = tuple[Sequence[int], Sequence[int]]
"""Offset and shape of a block in its tensor."""


@dataclass(frozen=True)
class Block:
    """The part of one tensor that this rank holds."""

    shape: tuple[int, ...]
    """The shape of the whole tensor."""
    local: Tensor
    offset: tuple[int, ...]
    chunk: list[int]
    """The chunk shape of the array, the same on all ranks."""
    writes: bool
    """Whether this rank writes the block: not if it is empty, or if another rank holds the same block."""


def block_of(tensor: Tensor) -> Block:
    """Return the block that this rank holds of a plain tensor (all of it; rank 0 writes) or of a DTensor."""
    if not isinstance(tensor, DTensor):
        is_first = not dist.is_initialized() or dist.get_rank() == 0
        chunk = arrays.chunk_shape(tensor.shape, tensor.element_size())
        return Block(tuple(tensor.shape), tensor, (0,) * tensor.dim(), chunk, is_first)
    mesh, local = tensor.device_mesh, tensor.to_local()
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the tensor's mesh"
    block = list(tensor.shape)
    is_empty = tensor.numel() == 0  # its first rank creates the array
    writes = local.numel() > 0 or is_empty
    for dimension, placement in enumerate(tensor.placements):
        assert not placement.is_partial(), "a partial sum must be redistributed before it is saved"
        if isinstance(placement, Shard) and not is_empty:
            block[placement.dim] = -(-block[placement.dim] // mesh.size(dimension))
        else:
            writes = writes and coordinate[dimension] == 0
    return Block(tuple(tensor.shape), local, tuple(offset), arrays.chunk_shape(block, local.element_size()), writes)


def check_tiling(
    shapes: Mapping[str, Sequence[int]], chunks: Mapping[str, Sequence[int]], regions: Sequence[Mapping[str, Region]]
) -> None:
    """Check that the regions that all ranks wrote tile every tensor exactly once, along its chunk grid.

    If two ranks wrote parts of one chunk into their own databases, the merge would silently lose one part.

    Args:
        shapes: the shape of each tensor, by name.
        chunks: the chunk shape of each tensor, by name.
        regions: for each rank, (offset, shape) of its region, by name of the tensor.

    Raises:
        AssertionError: if a chunk is missing or written twice; the error names the tensor.
    """
    for name, shape in shapes.items():
        times_written = np.zeros(
            [-(-size // chunk) for size, chunk in zip(shape, chunks[name], strict=True)], dtype=np.int64
        )
        for offset, size in (rank[name] for rank in regions if name in rank):
            covered = []
            for start, length, chunk, total in zip(offset, size, chunks[name], shape, strict=True):
                end = start + length
                is_aligned = start % chunk == 0 and (end % chunk == 0 or end == total)
                assert is_aligned, (
                    f"{name}: a rank wrote {start} to {end} of {total}, which is not on the chunk grid of {chunk}"
                )
                covered.append(slice(start // chunk, -(-end // chunk)))
            times_written[tuple(covered)] += 1
        num_missing, num_repeated = int((times_written == 0).sum()), int((times_written > 1).sum())
        assert not num_missing, f"{name}: no rank wrote {num_missing} of its {times_written.size} chunks"
        assert not num_repeated, f"{name}: two ranks wrote the same {num_repeated} of its {times_written.size} chunks"
