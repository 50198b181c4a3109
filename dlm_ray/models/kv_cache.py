"""Keys and values that outlive the pass that made them: of committed blocks, a slot a request; or of one pass, for the next to see.

Keys are kept as attention sees them, rotated to their absolute position, so nothing is computed twice.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig


class KeyValueSource(Protocol):
    """What attention asks for in every layer."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H, queries, D/H] keys and values of this pass -> those that its queries may see, [B, H, keys, D/H]."""


class KeyValueCache:
    """Committed blocks (`diffusion.denoiser.Cache`): position n of slot b lies at [b, :, n], whatever was written when.

    A pass writes its keys behind what is committed, where no query of an earlier block looks; only `commit` makes them stay. Slots in
    use are the first ones, so that a pass takes a view and copies nothing.

    Args:
        config: of the network.
        num_slots: requests at once.
        capacity_tokens: positions of each.
        device, dtype: of the network.
        fixed_shapes: every pass sees as many keys, most of them hidden by its mask, so that no slot's arithmetic depends on the others' lengths.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        num_slots: int,
        capacity_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        fixed_shapes: bool = False,
    ):
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # With one place more than is ever filled, no pass has nothing to hide, which would be another kernel.
        self._fixed_keys = capacity_tokens + 1 if fixed_shapes else None
        places = self._fixed_keys or capacity_tokens
        self._pairs = [
            torch.zeros(2, num_slots, heads, places, size, device=device, dtype=dtype)
            for _ in range(config.num_hidden_layers)
        ]
        self.capacity_tokens = capacity_tokens
        self.lengths = [0] * num_slots
        self.last_rows = torch.zeros(num_slots, config.hidden_size, device=device, dtype=dtype)
        self._places: Tensor | None = None
        self._end = 0

    def part(self, first: int, count: int) -> KeyValueCache:
        """The slots from `first` on, for one pass over them alone; what it wrote is committed here, where it lies."""
        part = copy.copy(self)
        part._pairs = [pair[:, first : first + count] for pair in self._pairs]
        part.lengths = self.lengths[first : first + count]
        part.last_rows = self.last_rows[first : first + count]
        return part

    def begin(self, offsets: tuple[int, ...], num_queries: int) -> int:
        """Makes ready for a pass of so many positions in the first len(offsets) slots; returns how many keys its queries see."""
        self._end = max(offsets) + num_queries
        assert self._end <= self.capacity_tokens, f"{self._end} positions in a cache of {self.capacity_tokens}"
        if len(set(offsets)) == 1 and self._fixed_keys is None:
            self._places = None
        else:
            start = torch.tensor(offsets, device=self.last_rows.device)[:, None]
            self._places = start + torch.arange(num_queries, device=start.device)  # [B, queries]
            self._end = self._fixed_keys or self._end
        return self._end

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes this pass's keys and values to their places, and gives all up to its last position."""
        num_rows, _, num_queries, _ = key.shape
        pair = self._pairs[layer]
        if self._places is None:
            pair[0, :num_rows, :, self._end - num_queries : self._end] = key
            pair[1, :num_rows, :, self._end - num_queries : self._end] = value
        else:
            row = torch.arange(num_rows, device=key.device)[:, None]
            pair[0, row, :, self._places] = key.transpose(1, 2)
            pair[1, row, :, self._places] = value.transpose(1, 2)
        return pair[0, :num_rows, :, : self._end], pair[1, :num_rows, :, : self._end]

    def commit(self, slot: int, num_tokens: int, last_row: Tensor) -> None:
        """The next `num_tokens` positions of a slot, which the last pass wrote, stay; `last_row` [D] is the hidden row of the last of them."""
        self.lengths[slot] += num_tokens
        self.last_rows[slot] = last_row

    def save(self, slot: int, start: int, num_tokens: int) -> Tensor:
        """[layers, 2, H, n, D/H]: a copy of so many committed positions."""
        return torch.stack([pair[:, slot, :, start : start + num_tokens] for pair in self._pairs])

    def restore(self, slot: int, saved: Sequence[Tensor], last_row: Tensor) -> None:
        """Begins an empty slot with what `save` gave, one behind the other; `last_row` [D] is the hidden row of the last position."""
        assert not self.lengths[slot], "the slot is empty"
        whole = torch.cat(list(saved), 3)
        for pair, own in zip(self._pairs, whole, strict=True):
            pair[:, slot, :, : own.shape[2]] = own
        self.commit(slot, whole.shape[3], last_row)

    def fork(self, source: int, target: int) -> None:
        """Makes slot `target` a copy of slot `source`."""
        length = self.lengths[source]
        for pair in self._pairs:
            pair[:, target, :, :length] = pair[:, source, :, :length]
        self.lengths[target] = length
        self.last_rows[target] = self.last_rows[source]

    def release(self, slot: int) -> None:
        """Empties a slot."""
        self.lengths[slot] = 0


class KeyValues:
    """One pass's keys and values, with their gradients, which later passes see behind their own: [own ; recorded]."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self.num_keys = 0
        self._is_complete = False

    def finish(self) -> None:
        """From here on, passes see what was recorded."""
        self.num_keys = self._pairs[0][0].shape[2]
        self._is_complete = True

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Records in the first pass; afterwards gives [own ; recorded]."""
        if not self._is_complete:
            assert layer == len(self._pairs), "layers run in order, once"
            self._pairs.append((key, value))
            return key, value
        recorded_key, recorded_value = self._pairs[layer]
        return torch.cat([key, recorded_key], 2), torch.cat([value, recorded_value], 2)
