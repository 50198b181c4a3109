"""Which block of a tensor this rank holds, and the proof that the blocks of all ranks make up the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    writes = local.numel() > 0
    for dimension, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            block[placement.dim] = -(-block[placement.dim] // mesh.size(dimension))
        else:
            writes = writes and coordinate[dimension] == 0
    return Block(tuple(tensor.shape), local, tuple(offset), arrays.chunk_shape(block, local.element_size()), writes)


def check_tiling(shapes: Mapping[str, Sequence[int]], chunks: Mapping[str, Sequence[int]], regions: Sequence[Mapping[str, Any]]) -> None:
    """Proves that the regions that all ranks wrote tile every tensor exactly once, on borders of its chunk grid.

    Two ranks that write parts of one chunk into databases of their own would lose one part without a word when the databases are merged.

    Args:
        shapes, chunks: by name.
        regions: of every rank, by name: (offset, shape) of what it wrote.

    Raises:
        AssertionError: naming the tensor.
    """
    for name, shape in shapes.items():
        written = [rank[name] for rank in regions if name in rank]
        for offset, size in written:
            for start, length, chunk, total in zip(offset, size, chunks[name], shape, strict=True):
                is_aligned = start % chunk == 0 and ((start + length) % chunk == 0 or start + length == total)
                assert is_aligned, f"{name}: rows {start} to {start + length} do not lie on the chunk grid of {chunk}"
        elements = sum(_volume(size) for _, size in written)
        assert elements == _volume(shape), f"{name}: the ranks wrote {elements} elements of {_volume(shape)}"
        for i, (offset, size) in enumerate(written):
            for other_offset, other_size in written[i + 1 :]:
                apart = any(a + m <= b or b + n <= a for a, m, b, n in zip(offset, size, other_offset, other_size, strict=True))
                assert apart or not _volume(size), f"{name}: two ranks wrote the same elements"


def _volume(shape: Sequence[int]) -> int:
    volume = 1
    for size in shape:
        volume *= size
    return volume
