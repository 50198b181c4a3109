"""Encodes clean tokens into empty slots of a cache; sequences share calls, and equal prefixes are encoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dlm_ray.diffusion.denoiser import Cache, Denoiser
from dlm_ray.diffusion.samplers.prefixes import Prefixes
from dlm_ray.diffusion.visibility import Visibility

# Positions per cached piece of a prefix; with fixed shapes a piece is larger, because each piece is one call.
PIECE_TOKENS, FIXED_PIECE_TOKENS = 16, 128


@dataclass
class Encoded:
    """The cost of encoding one sequence."""

    num_calls: int = 0
    """Network calls that the sequence took part in."""
    num_cached_tokens: int = 0
    """Tokens of its prefix that were restored from the prefix cache."""


class Encoder:
    """Fills slots of a cache with the keys and values of clean tokens.

    Args:
        denoiser: a network that attends in blocks, as `visibility` defines.
        cache: a cache of `denoiser`.
        visibility: the visibility of clean tokens, without offsets.
        block_tokens: K.
        capacity_tokens: positions of a slot.
        prefix_bytes: memory for beginnings of prompts; 0 keeps none.
        fixed_shapes: every call has one slot and begins and ends at multiples of a piece, so that the bits of a
            position depend only on the tokens before it, and not on how many of them were restored.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        cache: Cache,
        visibility: Visibility,
        *,
        block_tokens: int,
        capacity_tokens: int,
        prefix_bytes: int,
        fixed_shapes: bool,
    ):
        self.denoiser, self.cache, self.visibility = denoiser, cache, visibility
        self.capacity_tokens, self.fixed_shapes = capacity_tokens, fixed_shapes
        piece_tokens = min(FIXED_PIECE_TOKENS if fixed_shapes else PIECE_TOKENS, capacity_tokens // 4)
        self.prefixes = Prefixes(max(1, piece_tokens // block_tokens) * block_tokens, prefix_bytes)
        self.num_calls = 0

    def encode(self, first: int, rows: Sequence[list[int]], *, are_prompts: bool) -> list[Encoded]:
        """Encode whole blocks of clean tokens into the empty slots from `first` on.

        Prompts are added to the prefix cache, and restore their prefix from it.
        """
        costs = [Encoded() for _ in rows]
        numbers = range(len(rows))
        if not are_prompts or not self.prefixes.capacity_bytes:
            self._compute(first, rows, numbers, costs, are_kept=False)
            return costs
        now, later, started = [], [], set()
        for number in numbers:
            costs[number].num_cached_tokens = num_cached = self._restore(first + number, rows[number])
            beginning = tuple(rows[number][: num_cached + self.prefixes.piece_tokens])
            is_whole = len(beginning) == num_cached + self.prefixes.piece_tokens
            if is_whole and beginning in started:  # another row of this call computes it
                later.append(number)
                continue
            now.append(number)
            started.add(beginning)
        self._compute(first, rows, now, costs, are_kept=True)
        for number in later:
            costs[number].num_cached_tokens = self._restore(first + number, rows[number])
        self._compute(first, rows, later, costs, are_kept=True)
        return costs

    def _restore(self, slot: int, row: list[int]) -> int:
        """Restore the cached prefix of a row into a slot, and return its number of tokens."""
        self.cache.release(slot)
        pieces = self.prefixes.find(row)
        if pieces:
            self.cache.restore(slot, [piece.pairs for piece in pieces], pieces[-1].last_row)
        return self.cache.lengths[slot]

    def _compute(
        self, first: int, rows: Sequence[list[int]], numbers: Sequence[int], costs: list[Encoded], *, are_kept: bool
    ) -> None:
        """Encode the tokens of some rows that their slots do not hold yet."""
        starts = [(number, self.cache.lengths[first + number]) for number in numbers]
        # Adjacent slots with the same number of restored tokens share a call.
        adjacent = groupby(enumerate(starts), lambda pair: (pair[1][0] - pair[0], pair[1][1]))
        runs = (
            [[start] for start in starts] if self.fixed_shapes else [[start for _, start in run] for _, run in adjacent]
        )
        for run in runs:
            start, width = run[0][1], self.prefixes.piece_tokens if self.fixed_shapes else self.capacity_tokens
            longest = max(len(rows[number]) for number, _ in run)
            ends: list[dict[int, Tensor]] = [{} for _ in run]
            while start < longest:
                stop = min(start + width, self.capacity_tokens if self.fixed_shapes else longest)
                parts = [rows[number][start:stop] for number, _ in run]
                hidden = self._call(first + run[0][0], parts, stop - start)
                for place, (number, _) in enumerate(run):
                    costs[number].num_calls += bool(parts[place])
                    for end in range(
                        start + self.prefixes.piece_tokens, start + len(parts[place]) + 1, self.prefixes.piece_tokens
                    ):
                        ends[place][end] = hidden[place, end - start - 1]
                start = stop
            if are_kept:
                for place, (number, _) in enumerate(run):
                    self._keep(first + number, rows[number], ends[place])

    def _call(self, first: int, parts: list[list[int]], width: int) -> Tensor:
        """Return the hidden states [n, width, D] of the next tokens of adjacent slots, and commit those tokens.

        The tokens are padded on the right, where no block attends.
        """
        ids = torch.tensor([part + [0] * (width - len(part)) for part in parts], device=self.cache.last_rows.device)
        hidden = self.denoiser.hidden(ids, self.visibility, self.cache.slot_range(first, len(parts)))
        self.num_calls += 1
        for place, part in enumerate(parts):
            if part:
                self.cache.commit(first + place, len(part), hidden[place, len(part) - 1])
        return hidden

    def _keep(self, slot: int, row: list[int], ends: dict[int, Tensor]) -> None:
        """Add pieces of a row to the prefix cache.

        `ends` maps the position after a piece to the hidden state of its last position; other pieces are not added.
        """
        size = self.prefixes.piece_tokens

        def make(start: int) -> tuple[Tensor, Tensor] | None:
            return (self.cache.save(slot, start, size), ends[start + size].clone()) if start + size in ends else None

        self.prefixes.keep(row, make)
