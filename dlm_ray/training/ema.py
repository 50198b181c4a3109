"""The exponential moving average of the weights: float32, sharded like the parameters, with a warm-up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Ema:
    """Averages: average <- d * average + (1 - d) * parameter, d = min(decay, (1 + n) / (10 + n)) after n updates."""

    def __init__(self, root: nn.Module, decay: float):
        self.decay = decay
        self.parameters = dict(root.named_parameters())
        self.averages = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Add the parameters to the average, after update number `num_updates` (counted from 0)."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        torch._foreach_lerp_(self._local(self.averages), self._local(self.parameters), 1 - decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the averages into the network for the context, and restore the parameters after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, parameter in zip(self._local(self.averages), self._local(self.parameters), strict=True):
            kept = parameter.clone()
            parameter.copy_(average)
            average.copy_(kept)

    @staticmethod
    def _local(tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach() for tensor in tensors.values()]
