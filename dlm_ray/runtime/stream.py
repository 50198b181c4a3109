"""Training rows through Ray Data: the rows of `data.reading.iterate_rows`, in the same order, read ahead of the step by the cluster.

Ray Data has no iterator that resumes. So every rank makes datasets of its own from where the cursor stands, of one item for several
steps of this rank, in order. The actor that reads asks for no CPU, because the workers may hold all of them; reading takes next to none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from dlm_ray.runtime import cluster  # noqa: F401  first of all: it sets what Ray reads when it is imported

# isort: split
import ray.data

from dlm_ray.config.errors import DamageError
from dlm_ray.config.recipe import Source
from dlm_ray.data.order import Cursor, Order, SequenceReference
from dlm_ray.data.reading import DataSequence, ShardReader, by_step, shares

# A run is streamed in spans of so many items, so that its whole order has to be neither computed before the first step nor in memory.
_SPAN_ITEMS = 64


def ray_data_stream(
    sources: Sequence[Source], order: Order, cursor: Cursor, *, on_bad_sample: str = "fail", **share: int
) -> Iterator[tuple[list[DataSequence], Cursor]]:
    """For each of the next steps: this rank's rows, and the cursor behind the whole global batch.

    Args:
        sources: where the shards lie.
        order: of the run.
        cursor: where to begin.
        on_bad_sample: fail, or skip for rows of padding in the place of those of a missing or damaged shard.
        share: global_batch_size, rank, world_size, num_steps.

    Raises:
        DamageError: if a shard is missing or damaged, unless such are skipped.
    """
    groups = _groups([source.path for source in sources], order, cursor, on_bad_sample, share)
    # The next group is asked for before this one is used up: that hides the seconds in which the next span's actor starts.
    with ThreadPoolExecutor(1) as ahead:
        waiting = ahead.submit(next, groups, None)
        while (group := waiting.result()) is not None:
            waiting = ahead.submit(next, groups, None)
            yield from group


def _groups(
    paths: Sequence[str], order: Order, cursor: Cursor, on_bad_sample: str, share: dict[str, int]
) -> Iterator[list[tuple[list[DataSequence], Cursor]]]:
    """Several steps at a time."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    groups = shares(order, cursor, **share)
    while span := list(islice(groups, _SPAN_ITEMS)):
        items = [
            {"references": [(one.source, one.shard, one.row) for step in references for one in step]}
            for references, _ in span
        ]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
            _Reader,  # type: ignore[arg-type]  # Ray's annotation leaves out the classes that it takes
            fn_constructor_args=(paths, order, on_bad_sample),
            num_cpus=0,
            concurrency=1,
        )
        for (references, cursors), group in zip(span, dataset.iter_rows(), strict=True):
            if group["error"]:
                raise DamageError(group["error"])
            yield list(zip(by_step(_rows(group), references), cursors, strict=True))


def _rows(group: dict[str, Any]) -> list[DataSequence]:
    arrays = (
        group["input_ids"],
        group["document_ids"],
        group["num_bytes"],
        group["source"].tolist(),
        group["part"].tolist(),
        group["finding"],
        group["place"],
    )
    return [DataSequence(*fields) for fields in zip(*arrays, strict=True)]


class _Reader:
    """The actor: references -> the arrays of their rows, stacked. It checks each shard once."""

    def __init__(self, paths: Sequence[str], order: Order, on_bad_sample: str):
        self._reader = ShardReader(paths, order.indexes, on_bad_sample=on_bad_sample)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            rows = self._reader.read([SequenceReference(*reference) for reference in item["references"]])
        except DamageError as error:
            return {"error": str(error)}
        return {
            "input_ids": np.stack([row.input_ids for row in rows]),
            "document_ids": np.stack([row.document_ids for row in rows]),
            "num_bytes": np.stack([row.num_bytes for row in rows]),
            "source": np.array([row.source for row in rows]),
            "part": np.array([row.part for row in rows]),
            "finding": np.array([row.finding for row in rows]),
            "place": np.array([row.place for row in rows]),
            "error": "",
        }
