"""Keys and values that outlive the pass that computed them: of committed blocks, or of one pass for later passes.

Keys are stored as attention uses them, rotated to their absolute position, so nothing is computed twice.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedConfig

Group = tuple[Tensor, Tensor]
"""The keys and values [b, H, keys, D/H] that b consecutive rows of a pass attend to."""


class KeyValueSource(Protocol):
    """The keys and values that attention uses in every layer."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> list[Group]:
        """Return the keys and values to attend to, given those of this pass, [B, H, queries, D/H].

        The groups are in the order of the rows, and together have B rows.
        """


class KeyValueCache:
    """The keys and values of committed blocks (`diffusion.denoiser.Cache`); position n of slot b is at [b, :, n].

    A pass writes its keys after the committed ones, where no query of an earlier block attends; only `commit` keeps
    them. Slots in use are the first ones, so that a pass takes a view and copies nothing.

    Args:
        config: configuration of the network.
        num_slots: maximum number of requests at once.
        capacity_tokens: positions of each slot.
        device, dtype: device and precision of the network.
        fixed_shapes: every pass has the same number of keys, most of them masked, so that a slot's arithmetic does not
            depend on the lengths of other slots.
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
        # One place more than is ever filled, so that every pass has keys to mask and uses the same kernel.
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
        self._lookahead: Tensor | None = None
        self._num_lookahead = 0

    def slot_range(self, first: int, count: int) -> KeyValueCache:
        """Return a view of `count` slots from `first` on, for one pass over only them; they share the memory."""
        view = copy.copy(self)
        view._pairs = [pair[:, first : first + count] for pair in self._pairs]
        view.lengths = self.lengths[first : first + count]
        view.last_rows = self.last_rows[first : first + count]
        return view

    def with_lookahead(self, num_slots: int, slots: Sequence[int], num_tokens: int, num_rows: int) -> KeyValueCache:
        """Return a view for one pass over the first slots that also runs the block after the next one of some slots.

        Row b < num_slots of the pass holds the next positions of slot b, as without lookahead. Row num_slots + i holds
        the positions after those of row slots[i]; it attends to the keys that row slots[i] writes in the same pass.

        Args:
            num_slots: number of slots in the pass.
            slots: the slots whose following block is in the pass.
            num_tokens: positions of every row.
            num_rows: number of rows after the first `num_slots`; those beyond `slots` are padding.
        """
        view = copy.copy(self)
        padding = [0] * (num_rows - len(slots))
        view.lengths = [*self.lengths[:num_slots], *(self.lengths[slot] + num_tokens for slot in slots), *padding]
        view._lookahead = torch.tensor([*slots, *padding], device=self.last_rows.device)
        view._num_lookahead = len(slots)
        return view

    def begin(self, offsets: tuple[int, ...], num_queries: int) -> int:
        """Prepare a pass of `num_queries` positions after `offsets`, one per row, and return its number of keys."""
        self._end = max(offsets) + num_queries
        assert self._end <= self.capacity_tokens, f"{self._end} positions in a cache of {self.capacity_tokens}"
        if len(set(offsets)) == 1 and self._fixed_keys is None:
            self._places = None
        else:
            start = torch.tensor(offsets, device=self.last_rows.device)[:, None]
            self._places = start + torch.arange(num_queries, device=start.device)  # [B, queries]
            self._end = self._fixed_keys or self._end
        return self._end

    def extend(self, layer: int, key: Tensor, value: Tensor) -> list[Group]:
        """Write the keys and values of this pass, and return all up to its last position."""
        keys, values = self._pairs[layer]
        num_rows, num_queries = key.shape[0], key.shape[2]
        num_slots = num_rows if self._lookahead is None else num_rows - len(self._lookahead)
        if self._places is None:
            keys[:num_rows, :, self._end - num_queries : self._end] = key
            values[:num_rows, :, self._end - num_queries : self._end] = value
        else:
            slot = torch.arange(num_slots, device=key.device)
            if self._lookahead is not None:
                slot = torch.cat([slot, self._lookahead[: self._num_lookahead]])
            places = self._places[: len(slot)]  # padding rows write nothing
            keys[slot[:, None], :, places] = key[: len(slot)].transpose(1, 2)
            values[slot[:, None], :, places] = value[: len(slot)].transpose(1, 2)
        groups = [(keys[:num_slots, :, : self._end], values[:num_slots, :, : self._end])]
        if self._lookahead is not None:
            groups.append((keys[self._lookahead, :, : self._end], values[self._lookahead, :, : self._end]))
        return groups

    def commit(self, slot: int, num_tokens: int, last_row: Tensor) -> None:
        """Keep the next `num_tokens` positions of a slot, which the last pass wrote.

        `last_row` [D] is the hidden state of the last of them.
        """
        self.lengths[slot] += num_tokens
        self.last_rows[slot] = last_row

    def save(self, slot: int, start: int, num_tokens: int) -> Tensor:
        """Return a copy [layers, 2, H, n, D/H] of n = `num_tokens` committed positions."""
        return torch.stack([pair[:, slot, :, start : start + num_tokens] for pair in self._pairs])

    def restore(self, slot: int, saved: Sequence[Tensor], last_row: Tensor) -> None:
        """Fill an empty slot with the concatenated results of `save`.

        `last_row` [D] is the hidden state of the last position.
        """
        assert not self.lengths[slot], "the slot is empty"
        whole = torch.cat(list(saved), 3)
        for pair, saved_pair in zip(self._pairs, whole, strict=True):
            pair[:, slot, :, : saved_pair.shape[2]] = saved_pair
        self.commit(slot, whole.shape[3], last_row)

    def fork(self, source: int, target: int) -> None:
        """Copy slot `source` to slot `target`."""
        length = self.lengths[source]
        for pair in self._pairs:
            pair[:, target, :, :length] = pair[:, source, :, :length]
        self.lengths[target] = length
        self.last_rows[target] = self.last_rows[source]

    def release(self, slot: int) -> None:
        """Mark a slot as empty."""
        self.lengths[slot] = 0


class KeyValues:
    """The keys and values of one pass, with gradients; later passes attend to [their own ; these]."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self.num_keys = 0
        self._is_complete = False

    def finish(self) -> None:
        """Mark the pass as finished; later passes attend to its keys and values."""
        self.num_keys = self._pairs[0][0].shape[2]
        self._is_complete = True

    def extend(self, layer: int, key: Tensor, value: Tensor) -> list[Group]:
        """Store the keys and values of the first pass; in later passes, return [those of the pass ; stored]."""
        if not self._is_complete:
            assert layer == len(self._pairs), "layers run in order, once"
            self._pairs.append((key, value))
            return [(key, value)]
        stored_key, stored_value = self._pairs[layer]
        return [(torch.cat([key, stored_key], 2), torch.cat([value, stored_value], 2))]
