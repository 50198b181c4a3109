"""Host copies of a rank's blocks, which a save writes in the background while the training changes the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dlm_ray.checkpoint.arrays import as_numpy
from dlm_ray.checkpoint.layout import Block, block_of

_Layout = tuple[torch.Size, torch.dtype, object, object]
"""Shape, type, placements and mesh of a tensor."""


class Staging:
    """Buffers that the first save allocates and every save fills: as many bytes of host memory as this rank writes.

    On CUDA they are pinned, so that the copy runs at the speed of the bus. They must not be filled before the save that
    reads them has ended.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, tuple[_Layout, Block]] = {}

    def fill(self, tensors: Mapping[str, Tensor]) -> dict[str, Block]:
        """Return the blocks of `tensors`, those that this rank writes as copies; then the tensors may change."""
        blocks = {name: self._filled(name, tensor.detach()) for name, tensor in tensors.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return blocks

    def _filled(self, name: str, tensor: Tensor) -> Block:
        layout: _Layout = (
            tensor.shape,
            tensor.dtype,
            getattr(tensor, "placements", None),
            getattr(tensor, "device_mesh", None),
        )
        cached = self._blocks.get(name)
        if cached is None or cached[0] != layout:  # computing the layout takes longer than copying a small block
            block = block_of(tensor)
            if block.writes:
                block = replace(
                    block, local=torch.empty(block.local.shape, dtype=block.local.dtype, pin_memory=block.local.is_cuda)
                )
            cached = (layout, block)
            self._blocks[name] = cached
        block = cached[1]
        if block.writes:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.is_cuda:
                block.local.copy_(local, non_blocking=True)
            else:  # numpy: torch's threads synchronize at every tensor, which takes longer than the copy
                np.copyto(as_numpy(block.local), as_numpy(local))
        return block
