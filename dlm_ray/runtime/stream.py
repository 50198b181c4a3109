"""Training rows through Ray Data: the same rows in the same order as `data.reading.iterate_rows`, read by tasks of the cluster ahead of the step.

Ray Data has no iterator that resumes. So every rank makes a dataset of its own from where the cursor stands: one task for several
steps of this rank, in order. The tasks ask for no CPU, because the workers may hold all of them; reading a few rows a second
takes next to none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dlm_ray.runtime import cluster  # noqa: F401  first of all: it sets what Ray reads when it is imported

# isort: split
import ray.data

from dlm_ray.config.errors import DamageError
from dlm_ray.config.recipe import Source
from dlm_ray.data.order import Cursor, Order, RowReference
from dlm_ray.data.reading import Row, ShardReader, by_step, shares

_TASKS_AT_ONCE = 2


def ray_data_stream(sources: Sequence[Source], order: Order, cursor: Cursor, **share: int) -> Iterator[tuple[list[Row], Cursor]]:
    """For each of the next steps: this rank's rows, and the cursor behind the whole global batch.

    Args:
        sources: where the shards lie.
        order: of the run.
        cursor: where to begin.
        share: global_batch_rows, rank, world_size, num_steps.

    Raises:
        DamageError: if a shard is missing or damaged.
    """
    planned = list(shares(order, cursor, **share))
    if not planned:
        return
    reader = _Reader([source.path for source in sources], order)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    items = [{"references": [(one.source, one.shard, one.row) for step in references for one in step]} for references, _ in planned]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(reader, num_cpus=0, concurrency=_TASKS_AT_ONCE)
    for (references, cursors), group in zip(planned, dataset.iter_rows(), strict=True):
        if group["error"]:
            raise DamageError(group["error"])
        rows = [
            Row(input_ids, document_ids, num_bytes, source, part)
            for input_ids, document_ids, num_bytes, source, part in zip(
                group["input_ids"], group["document_ids"], group["num_bytes"], group["source"].tolist(), group["part"].tolist(), strict=True
            )
        ]
        yield from zip(by_step(rows, references), cursors, strict=True)


class _Reader:
    """What a task runs: references -> the arrays of their rows, stacked."""

    def __init__(self, paths: Sequence[str], order: Order):
        self._reader = ShardReader(paths, order.indexes)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        try:
            rows = self._reader.read([RowReference(*reference) for reference in item["references"]])
        except DamageError as error:
            return {"error": str(error)}
        return {
            "input_ids": np.stack([row.input_ids for row in rows]),
            "document_ids": np.stack([row.document_ids for row in rows]),
            "num_bytes": np.stack([row.num_bytes for row in rows]),
            "source": np.array([row.source for row in rows]),
            "part": np.array([row.part for row in rows]),
            "error": "",
        }
