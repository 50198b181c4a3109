"""Clean text into empty slots of a cache: whole blocks, of several texts in one call, and what prompts begin with alike once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dlm_ray.diffusion.denoiser import Cache, Denoiser
from dlm_ray.diffusion.samplers.prefixes import Prefixes
from dlm_ray.diffusion.visibility import Visibility

# Positions that are kept and found together; more with fixed shapes, where so many are one call.
PIECE_TOKENS, FIXED_PIECE_TOKENS = 16, 128


@dataclass
class Encoded:
    """What one text cost."""

    num_calls: int = 0
    num_cached_tokens: int = 0
    """Of its beginning, which no call computed."""


class Encoder:
    """Fills slots.

    Args:
        denoiser: a network that sees in blocks, as `visibility` says.
        cache: of `denoiser`.
        visibility: of clean text, without offsets.
        block_tokens: K.
        capacity_tokens: of a slot.
        prefix_bytes: of memory for what prompts begin with; 0 keeps nothing.
        fixed_shapes: every call has one slot and begins and ends at multiples of a piece, so that the bits of a position depend on what
            stands before it alone, and not on how much of that was found.
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
        usual = min(FIXED_PIECE_TOKENS if fixed_shapes else PIECE_TOKENS, capacity_tokens // 4)
        self.prefixes = Prefixes(max(1, usual // block_tokens) * block_tokens, prefix_bytes)
        self.num_calls = 0

    def encode(self, first: int, rows: Sequence[list[int]], *, are_prompts: bool) -> list[Encoded]:
        """Whole blocks of text into the empty slots from `first` on. Prompts are kept, and begin with what is kept of others."""
        costs = [Encoded() for _ in rows]
        everybody = range(len(rows))
        if not are_prompts or not self.prefixes.capacity_bytes:
            self._compute(first, rows, everybody, costs, are_kept=False)
            return costs
        now, later, begun = [], [], set()
        for number in everybody:
            costs[number].num_cached_tokens = found = self._restore(first + number, rows[number])
            beginning = tuple(rows[number][: found + self.prefixes.piece_tokens])
            is_whole = len(beginning) == found + self.prefixes.piece_tokens
            if is_whole and beginning in begun:  # another is about to compute it
                later.append(number)
                continue
            now.append(number)
            begun.add(beginning)
        self._compute(first, rows, now, costs, are_kept=True)
        for number in later:
            costs[number].num_cached_tokens = self._restore(first + number, rows[number])
        self._compute(first, rows, later, costs, are_kept=True)
        return costs

    def _restore(self, slot: int, row: list[int]) -> int:
        """Begins a slot with what is kept of a text's beginning; returns how many tokens that is."""
        self.cache.release(slot)
        found = self.prefixes.find(row)
        if found:
            self.cache.restore(slot, [piece.pairs for piece in found], found[-1].last_row)
        return self.cache.lengths[slot]

    def _compute(
        self, first: int, rows: Sequence[list[int]], numbers: Sequence[int], costs: list[Encoded], *, are_kept: bool
    ) -> None:
        """What the slots of some rows do not have of them yet."""
        own = [(number, self.cache.lengths[first + number]) for number in numbers]
        # Neighbours with as much found share a call.
        alike = groupby(enumerate(own), lambda one: (one[1][0] - one[0], one[1][1]))
        runs = [[pair] for pair in own] if self.fixed_shapes else [[pair for _, pair in run] for _, run in alike]
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
        """One pass over the next tokens of neighbours, padded on the right, where no block looks -> hidden rows [n, width, D]."""
        ids = torch.tensor([part + [0] * (width - len(part)) for part in parts], device=self.cache.last_rows.device)
        hidden = self.denoiser.hidden(ids, self.visibility, self.cache.part(first, len(parts)))
        self.num_calls += 1
        for place, part in enumerate(parts):
            if part:
                self.cache.commit(first + place, len(part), hidden[place, len(part) - 1])
        return hidden

    def _keep(self, slot: int, row: list[int], ends: dict[int, Tensor]) -> None:
        """Keeps the pieces of a text whose last hidden rows are in `ends`, by the position behind them."""
        size = self.prefixes.piece_tokens

        def make(start: int) -> tuple[Tensor, Tensor] | None:
            return (self.cache.save(slot, start, size), ends[start + size].clone()) if start + size in ends else None

        self.prefixes.keep(row, make)
