"""Host copies of a rank's blocks: what a save writes in the background while the training goes on with the tensors themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dlm_ray.checkpoint.layout import Block, block_of


class Staging:
    """Buffers that are made by the first save and filled anew by every other: as many bytes of host memory as this rank writes.

    They are pinned where there is CUDA, so that the copy runs at the bus's speed. Nobody may fill them before the save that reads them has ended.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def fill(self, tensors: Mapping[str, Tensor]) -> dict[str, Block]:
        """The blocks of `tensors`, those that this rank writes as copies; after it the tensors may change."""
        blocks = {}
        for name, tensor in tensors.items():
            block = block_of(tensor)
            if block.writes:
                local = block.local.detach()
                buffer = self._buffers.get(name)
                if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                    buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                    self._buffers[name] = buffer
                buffer.copy_(local, non_blocking=True)
                block = replace(block, local=buffer)
            blocks[name] = block
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return blocks
