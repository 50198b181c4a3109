"""The interface between the training loop and the readers of its batches, and the reader of a single process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from dlm_ray.config.recipe import Source
from dlm_ray.data.order import Cursor, Order
from dlm_ray.data.reading import DataSequence, ShardReader, iterate_sequences


class Stream(Protocol):
    """A source of training batches: `local_stream`, or Ray Data's."""

    def __call__(
        self,
        sources: Sequence[Source],
        order: Order,
        cursor: Cursor,
        /,
        *,
        on_bad_sample: str,
        global_batch_size: int,
        rank: int,
        world_size: int,
        num_steps: int,
    ) -> Iterator[tuple[list[DataSequence], Cursor]]:
        """Yield, for each step, this rank's sequences and the cursor after the global batch."""


def local_stream(
    sources: Sequence[Source], order: Order, cursor: Cursor, *, on_bad_sample: str = "fail", **share: int
) -> Iterator[tuple[list[DataSequence], Cursor]]:
    """Yield, for each step, this rank's sequences, read by this process, and the cursor after the global batch."""
    reader = ShardReader([source.path for source in sources], order.indexes, on_bad_sample=on_bad_sample)
    return iterate_sequences(reader, order, cursor, **share)
