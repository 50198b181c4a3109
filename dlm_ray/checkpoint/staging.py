"""Host copies of a rank's blocks: what a save writes in the background while the training goes on with the tensors themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dlm_ray.checkpoint.arrays import as_numpy
from dlm_ray.checkpoint.layout import Block, block_of


class Staging:
    """Buffers that are made by the first save and filled anew by every other: as many bytes of host memory as this rank writes.

    They are pinned where there is CUDA, so that the copy runs at the bus's speed. Nobody may fill them before the save that reads them has ended.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, tuple[Any, Block]] = {}

    def fill(self, tensors: Mapping[str, Tensor]) -> dict[str, Block]:
        """The blocks of `tensors`, those that this rank writes as copies; after it the tensors may change."""
        blocks = {name: self._filled(name, tensor.detach()) for name, tensor in tensors.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return blocks

    def _filled(self, name: str, tensor: Tensor) -> Block:
        layout = (tensor.shape, tensor.dtype, getattr(tensor, "placements", None), getattr(tensor, "device_mesh", None))
        known = self._blocks.get(name)
        if known is None or known[0] != layout:  # where a block lies takes longer to work out than to copy a small one
            block = block_of(tensor)
            if block.writes:
                block = replace(
                    block, local=torch.empty(block.local.shape, dtype=block.local.dtype, pin_memory=block.local.is_cuda)
                )
            known = (layout, block)
            self._blocks[name] = known
        block = known[1]
        if block.writes:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.is_cuda:
                block.local.copy_(local, non_blocking=True)
            else:  # torch's threads wait for each other at every tensor, which on a busy machine takes longer than the copy
                np.copyto(as_numpy(block.local), as_numpy(local))
        return block
