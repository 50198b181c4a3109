"""The order of training sequences: a pure function (seed, cursor) -> sequences over a weighted list of sources.

The next sequence comes from the source that is furthest below its weight, so the counts per source in the cursor are
all that seeking needs. Within a source, every epoch permutes the shards, and permutes the sequences within windows of
consecutive permuted shards: reads are sequential, and memory is O(shards) plus one window. Every sequence occurs
exactly once per epoch. The order does not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dlm_ray.config.manifest_fields import CursorFields
from dlm_ray.data.index import Index

# Philox counters that separate the permutation of shards from the permutations within windows.
_SHARDS, _WINDOW = 0, 1


@dataclass(frozen=True)
class Cursor:
    """A position in the order of a run: how many sequences of all ranks come before it."""

    num_sequences: int
    """Sequences of all sources."""
    counts: tuple[int, ...]
    """Sequences of each source."""

    @classmethod
    def start(cls, num_sources: int) -> Cursor:
        """Return the position before the first sequence."""
        return cls(0, (0,) * num_sources)

    def as_dict(self) -> CursorFields:
        """Return the cursor as a manifest holds it."""
        return {"num_sequences": self.num_sequences, "counts": list(self.counts)}

    @classmethod
    def from_dict(cls, fields: CursorFields) -> Cursor:
        """Return the cursor that a manifest holds."""
        return cls(fields["num_sequences"], tuple(fields["counts"]))


@dataclass(frozen=True)
class SequenceReference:
    """The location of a sequence: number of the source, of the shard in the split, and of the sequence in the shard."""

    source: int
    shard: int
    sequence: int


def as_references(places: np.ndarray) -> list[SequenceReference]:
    """Convert an array of places [num_sequences, 3], see `Order.places`."""
    return [SequenceReference(*place) for place in places.tolist()]


class Order:
    """The order of the training sequences of one run.

    Args:
        indexes: the index of each source.
        weights: the relative share of each source in the sequences; they need not sum to 1.
        seed: the seed of the run.
        window_shards: number of consecutive shards within which sequences are permuted.
        split: the split of the sources to read.
    """

    def __init__(
        self, indexes: Sequence[Index], weights: Sequence[float], seed: int, window_shards: int, split: str = "train"
    ):
        self.indexes = tuple(indexes)
        self.weights = np.array(weights, dtype=np.float64) / sum(weights)
        self.seed, self.window_shards = seed, window_shards
        self._shard_sizes = [
            np.array([shard.sequences for shard in index.splits[split].shards], dtype=np.int64) for index in indexes
        ]
        self._epochs: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}
        self._windows: dict[int, tuple[int, int, np.ndarray]] = {}

    def references(self, cursor: Cursor, num_sequences: int) -> tuple[list[SequenceReference], Cursor]:
        """Return the next `num_sequences` sequences after `cursor`, and the cursor after them."""
        places, end = self.places(cursor, num_sequences)
        return as_references(places), end

    def places(self, cursor: Cursor, num_sequences: int) -> tuple[np.ndarray, Cursor]:
        """Return `references` as an array [num_sequences, 3] of source, shard and sequence; fast for millions."""
        sources, counts = self._sources(cursor, num_sequences)
        places = np.empty((num_sequences, 3), dtype=np.int64)
        places[:, 0] = sources
        for source, (before, after) in enumerate(zip(cursor.counts, counts, strict=True)):
            places[sources == source, 1:] = self._places_in_source(source, before, after)
        return places, Cursor(cursor.num_sequences + num_sequences, counts)

    def _sources(self, cursor: Cursor, num_sequences: int) -> tuple[np.ndarray, tuple[int, ...]]:
        """Return the source of each of the next sequences [num_sequences], and the counts per source after them."""
        if len(self.weights) == 1:
            return np.zeros(num_sequences, dtype=np.int64), (cursor.counts[0] + num_sequences,)
        weights, counts = self.weights.tolist(), list(cursor.counts)
        sources = []
        for total in range(cursor.num_sequences + 1, cursor.num_sequences + num_sequences + 1):
            deficits = [weight * total - count for weight, count in zip(weights, counts, strict=True)]
            source = deficits.index(max(deficits))
            sources.append(source)
            counts[source] += 1
        return np.array(sources, dtype=np.int64), tuple(counts)

    def _places_in_source(self, source: int, before: int, after: int) -> np.ndarray:
        """Return shard and sequence [after - before, 2] of the sequences `before` to `after` of a source's order."""
        epoch_size = int(self._shard_sizes[source].sum())
        places = [np.empty((0, 2), dtype=np.int64)]
        while before < after:
            epoch, position = divmod(before, epoch_size)
            order, ends = self._epoch(source, epoch)
            window = int(np.searchsorted(ends, position, side="right")) // self.window_shards
            first_shard = window * self.window_shards
            window_start = int(ends[first_shard - 1]) if first_shard else 0
            window_end = int(ends[min(first_shard + self.window_shards, len(ends)) - 1])
            count = min(after - before, window_end - position)
            permutation = self._window(source, epoch, window, window_end - window_start)
            offset = position - window_start
            permuted = window_start + permutation[offset : offset + count]
            slots = np.searchsorted(ends, permuted, side="right")
            shards = order[slots]
            places.append(np.stack([shards, permuted - (ends[slots] - self._shard_sizes[source][shards])], axis=1))
            before += count
        return np.concatenate(places)

    def _epoch(self, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards in the order of this epoch, and the number of sequences up to the end of each; cached."""
        cached = self._epochs.get(source)
        if cached is None or cached[0] != epoch:
            order = self._random(source, epoch, _SHARDS, 0).permutation(len(self._shard_sizes[source]))
            cached = (epoch, order, self._shard_sizes[source][order].cumsum())
            self._epochs[source] = cached
        return cached[1], cached[2]

    def _window(self, source: int, epoch: int, window: int, num_sequences: int) -> np.ndarray:
        """Return the permutation of the sequences of one window; cached."""
        cached = self._windows.get(source)
        if cached is None or cached[:2] != (epoch, window):
            cached = (epoch, window, self._random(source, epoch, _WINDOW, window).permutation(num_sequences))
            self._windows[source] = cached
        return cached[2]

    def _random(self, source: int, epoch: int, use: int, window: int) -> np.random.Generator:
        """Return the generator of one permutation."""
        return np.random.Generator(np.random.Philox(key=[self.seed, source], counter=[0, use, window, epoch]))
