"""Which block of a tensor this rank holds, and the proof that the blocks of all ranks make up the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dlm_ray.checkpoint import arrays


@dataclass(frozen=True)
class Block:
    """This rank's part of one tensor."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    local: Tensor
    offset: tuple[int, ...]
    chunk: list[int]
    """Of the array; the same on all ranks."""
    writes: bool
    """Whether this rank writes it: not if it holds nothing, or if another rank holds the same."""


def block_of(tensor: Tensor) -> Block:
    """The block that this rank holds of a plain tensor (all of it; rank 0 writes) or of a DTensor."""
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
        assert not placement.is_partial(), "a partial sum is no tensor yet: redistribute it before it is saved"
        if isinstance(placement, Shard) and not is_empty:
            block[placement.dim] = -(-block[placement.dim] // mesh.size(dimension))
        else:
            writes = writes and coordinate[dimension] == 0
    return Block(tuple(tensor.shape), local, tuple(offset), arrays.chunk_shape(block, local.element_size()), writes)


def check_tiling(
    shapes: Mapping[str, Sequence[int]], chunks: Mapping[str, Sequence[int]], regions: Sequence[Mapping[str, Any]]
) -> None:
    """Proves that the regions that all ranks wrote tile every tensor exactly once, on borders of its chunk grid.

    Two ranks that write parts of one chunk into databases of their own would lose one part without a word when the databases are merged.

    Args:
        shapes, chunks: by name.
        regions: of every rank, by name: (offset, shape) of what it wrote.

    Raises:
        AssertionError: naming the tensor.
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
