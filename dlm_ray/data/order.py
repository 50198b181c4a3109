"""The exact order of training rows: a pure function (seed, cursor) -> rows over a weighted list of sources.

Which source the next row comes from is the one furthest behind its weight; so the counts by source in the cursor are all that
seeking needs. Within a source every epoch permutes the shards, and the rows within windows of consecutive permuted shards:
sequential reads, O(shards) memory plus one window. Every row comes exactly once an epoch. The order knows nothing of workers, so
it is the same on 1 and on 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlm_ray.data.index import Index

# Philox counters keep the permutation of shards apart from the permutations within windows.
_SHARDS, _WINDOW = 0, 1


@dataclass(frozen=True)
class Cursor:
    """How many rows were taken, globally, in all and of each source."""

    rows: int
    counts: tuple[int, ...]

    @classmethod
    def start(cls, num_sources: int) -> Cursor:
        """Before the first row."""
        return cls(0, (0,) * num_sources)

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return {"rows": self.rows, "counts": list(self.counts)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Cursor:
        """From a manifest."""
        return cls(fields["rows"], tuple(fields["counts"]))


@dataclass(frozen=True)
class SequenceReference:
    """Where a row lies: the source's number, the shard's place in the split's list, the row in the shard."""

    source: int
    shard: int
    row: int


def as_references(places: np.ndarray) -> list[SequenceReference]:
    """The rows of an array of places [num_rows, 3]."""
    return [SequenceReference(*place) for place in places.tolist()]


class Order:
    """The order of one run.

    Args:
        indexes: one a source.
        weights: the share of each source in the rows, of any sum.
        seed: of the run.
        window_shards: rows are permuted within so many shards.
        split: of the sources.
    """

    def __init__(
        self, indexes: Sequence[Index], weights: Sequence[float], seed: int, window_shards: int, split: str = "train"
    ):
        self.indexes = tuple(indexes)
        self.weights = np.array(weights, dtype=np.float64) / sum(weights)
        self.seed, self.window_shards = seed, window_shards
        self._shard_rows = [
            np.array([shard.rows for shard in index.splits[split].shards], dtype=np.int64) for index in indexes
        ]
        self._epochs: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}
        self._windows: dict[int, tuple[int, int, np.ndarray]] = {}

    def references(self, cursor: Cursor, num_rows: int) -> tuple[list[SequenceReference], Cursor]:
        """The next `num_rows` rows after `cursor`, and the cursor behind them."""
        places, end = self.places(cursor, num_rows)
        return as_references(places), end

    def places(self, cursor: Cursor, num_rows: int) -> tuple[np.ndarray, Cursor]:
        """The same as an array [num_rows, 3] of source, shard and row, for orders of millions."""
        chosen, counts = self._sources(cursor, num_rows)
        places = np.empty((num_rows, 3), dtype=np.int64)
        places[:, 0] = chosen
        for source, (before, after) in enumerate(zip(cursor.counts, counts, strict=True)):
            places[chosen == source, 1:] = self._rows(source, before, after)
        return places, Cursor(cursor.rows + num_rows, counts)

    def _sources(self, cursor: Cursor, num_rows: int) -> tuple[np.ndarray, tuple[int, ...]]:
        """The source of each of the next rows [num_rows], and the counts by source behind them."""
        if len(self.weights) == 1:
            return np.zeros(num_rows, dtype=np.int64), (cursor.counts[0] + num_rows,)
        weights, counts = self.weights.tolist(), list(cursor.counts)
        chosen = []
        for taken in range(cursor.rows + 1, cursor.rows + num_rows + 1):
            deficits = [weight * taken - count for weight, count in zip(weights, counts, strict=True)]
            source = deficits.index(max(deficits))
            chosen.append(source)
            counts[source] += 1
        return np.array(chosen, dtype=np.int64), tuple(counts)

    def _rows(self, source: int, before: int, after: int) -> np.ndarray:
        """Shard and row [after - before, 2] of the rows number `before` up to `after` that the source ever gives."""
        num_rows = int(self._shard_rows[source].sum())
        found = [np.empty((0, 2), dtype=np.int64)]
        while before < after:
            epoch, position = divmod(before, num_rows)
            order, ends = self._epoch(source, epoch)
            window = int(np.searchsorted(ends, position, side="right")) // self.window_shards
            first = window * self.window_shards
            begins = int(ends[first - 1]) if first else 0
            stops = int(ends[min(first + self.window_shards, len(ends)) - 1])
            count = min(after - before, stops - position)
            inside = (
                begins
                + self._window(source, epoch, window, stops - begins)[position - begins : position - begins + count]
            )
            at = np.searchsorted(ends, inside, side="right")
            found.append(np.stack([order[at], inside - (ends[at] - self._shard_rows[source][order[at]])], axis=1))
            before += count
        return np.concatenate(found)

    def _epoch(self, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order, and the number of rows up to the end of each."""
        known = self._epochs.get(source)
        if known is None or known[0] != epoch:
            order = self._random(source, epoch, _SHARDS, 0).permutation(len(self._shard_rows[source]))
            known = (epoch, order, self._shard_rows[source][order].cumsum())
            self._epochs[source] = known
        return known[1], known[2]

    def _window(self, source: int, epoch: int, window: int, num_rows: int) -> np.ndarray:
        """The permutation of the rows of one window."""
        known = self._windows.get(source)
        if known is None or known[:2] != (epoch, window):
            known = (epoch, window, self._random(source, epoch, _WINDOW, window).permutation(num_rows))
            self._windows[source] = known
        return known[2]

    def _random(self, source: int, epoch: int, use: int, window: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, source], counter=[0, use, window, epoch]))
