"""Training sequences through Ray Data: `data.reading.iterate_sequences`, read ahead of the step.

Ray Data has no iterator that can resume. So every rank makes its own datasets from the cursor on; an item holds several
steps of this rank, in order. The reading actor reserves no CPU, because the workers may hold all of them; reading takes
very little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypedDict, cast

import numpy as np

from dlm_ray.runtime import cluster  # noqa: F401  imported first: it sets the variables that Ray reads

# isort: split
import ray.data

from dlm_ray.config.errors import DamageError
from dlm_ray.config.recipe import Source
from dlm_ray.data.order import Cursor, Order, SequenceReference
from dlm_ray.data.reading import DataSequence, ShardReader, group_by_step, rank_batches

# Items per dataset: the whole order of a run need not be computed before the first step, nor fit into memory.
_WINDOW_ITEMS = 64


def ray_data_stream(
    sources: Sequence[Source], order: Order, cursor: Cursor, *, on_bad_sample: str = "fail", **share: int
) -> Iterator[tuple[list[DataSequence], Cursor]]:
    """Yield, for each of the next steps, this rank's sequences and the cursor after the whole global batch.

    Args:
        sources: folders of the shards.
        order: of the run.
        cursor: where to begin.
        on_bad_sample: `fail`, or `skip` for padding in place of the sequences of a missing or damaged shard.
        share: global_batch_size, rank, world_size, num_steps.

    Raises:
        DamageError: if a shard is missing or damaged and not skipped.
    """
    groups = _groups([source.path for source in sources], order, cursor, on_bad_sample, share)
    # Requesting the next group before this one is used up hides the seconds in which the next dataset's actor starts.
    with ThreadPoolExecutor(1) as executor:
        pending = executor.submit(next, groups, None)
        while (group := pending.result()) is not None:
            pending = executor.submit(next, groups, None)
            yield from group


def _groups(
    paths: Sequence[str], order: Order, cursor: Cursor, on_bad_sample: str, share: dict[str, int]
) -> Iterator[list[tuple[list[DataSequence], Cursor]]]:
    """Yield the sequences and cursors of several steps at a time."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    groups = rank_batches(order, cursor, **share)
    while window := list(islice(groups, _WINDOW_ITEMS)):
        items = [
            {"references": [(one.source, one.shard, one.sequence) for step in references for one in step]}
            for references, _ in window
        ]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
            _Reader,  # type: ignore[arg-type]  # Ray's annotation leaves out the classes that it accepts
            fn_constructor_args=(paths, order, on_bad_sample),
            num_cpus=0,
            concurrency=1,
        )
        for (references, cursors), group in zip(window, dataset.iter_rows(), strict=True):
            if group["error"]:
                raise DamageError(group["error"])
            yield list(zip(group_by_step(_sequences(cast("_Group", group)), references), cursors, strict=True))


def _sequences(group: _Group) -> list[DataSequence]:
    """Return the sequences of a reader's item."""
    arrays = (
        group["input_ids"],
        group["document_ids"],
        group["num_bytes"],
        group["source"].tolist(),
        group["chunk"].tolist(),
        group["finding"],
        group["place"],
    )
    return [DataSequence(*fields) for fields in zip(*arrays, strict=True)]


class _Item(TypedDict):
    """The sequences of several steps of one rank, by reference."""

    references: list[tuple[int, int, int]]


class _Group(TypedDict, total=False):
    """The sequences of an item, stacked; only `error` if a shard is damaged."""

    input_ids: np.ndarray
    document_ids: np.ndarray
    num_bytes: np.ndarray
    source: np.ndarray
    chunk: np.ndarray
    finding: np.ndarray
    place: np.ndarray
    error: str


class _Reader:
    """The reading actor: turns references into stacked arrays, and checks each shard once."""

    def __init__(self, paths: Sequence[str], order: Order, on_bad_sample: str):
        self._reader = ShardReader(paths, order.indexes, on_bad_sample=on_bad_sample)

    def __call__(self, item: _Item) -> _Group:
        """Return the arrays of an item's sequences, or its error."""
        try:
            sequences = self._reader.read([SequenceReference(*reference) for reference in item["references"]])
        except DamageError as error:
            return {"error": str(error)}
        return {
            "input_ids": np.stack([sequence.input_ids for sequence in sequences]),
            "document_ids": np.stack([sequence.document_ids for sequence in sequences]),
            "num_bytes": np.stack([sequence.num_bytes for sequence in sequences]),
            "source": np.array([sequence.source for sequence in sequences]),
            "chunk": np.array([sequence.chunk for sequence in sequences]),
            "finding": np.array([sequence.finding for sequence in sequences]),
            "place": np.array([sequence.place for sequence in sequences]),
            "error": "",
        }
