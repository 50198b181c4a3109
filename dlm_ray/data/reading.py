"""References -> rows: shards are checked when they are first touched, and read in ascending order."""

from __future__ import annotations

import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np

from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.config.recipe import Source
from dlm_ray.data import shards, storage
from dlm_ray.data.index import Index, Shard, load_index
from dlm_ray.data.order import Cursor, Order, SequenceReference, as_references

# Rows that are read ahead at once; more makes fewer and longer reads of each shard.
_READ_AHEAD_ROWS = 1024
# Of remote shards, copied to the local disk by each reader; a window's worth and more.
_COPIES_BYTES = 4 * 2**30
_BLOCK_BYTES = 4 * 2**20


class DataSequence(NamedTuple):
    """One packed row; see `packing.PackedSequence`."""

    input_ids: np.ndarray
    document_ids: np.ndarray
    num_bytes: np.ndarray
    source: int
    part: int
    """With the document id, what names a document of the source."""
    finding: str = ""
    """What is wrong with its shard, of a row of padding that stands for one that cannot be read."""
    place: str = ""
    """Shard and number of the row, for messages."""


def open_sources(sources: Sequence[Source]) -> list[Index]:
    """The indexes of all sources.

    Raises:
        UserError: if one is no data folder or has no training rows, or two differ in tokenizer, its start and end tokens, or row length.
    """
    indexes = [load_index(source.path) for source in sources]
    first = indexes[0]
    for source, index in zip(sources, indexes, strict=True):
        if index.tokenizer.sha256 != first.tokenizer.sha256:
            raise UserError(
                f"data.sources: {source.path} was made with tokenizer {index.tokenizer.name} (sha256 {index.tokenizer.sha256[:12]}) and "
                f"{sources[0].path} with {first.tokenizer.name} ({first.tokenizer.sha256[:12]}); build both with the same --tokenizer"
            )
        if index.sequence_length != first.sequence_length:
            raise UserError(
                f"data.sources: {source.path} has rows of {index.sequence_length} tokens and {sources[0].path} of {first.sequence_length}; build both with "
                "the same --sequence-length"
            )
        if (index.tokenizer.start_id, index.tokenizer.end_id) != (first.tokenizer.start_id, first.tokenizer.end_id):
            raise UserError(
                f"data.sources: {source.path} has start token {index.tokenizer.start_id} and end token {index.tokenizer.end_id}, and "
                f"{sources[0].path} has {first.tokenizer.start_id} and {first.tokenizer.end_id}; build both with the same --tokenizer"
            )
        if not index.splits["train"].rows:
            raise UserError(
                f"data.sources: {source.path} has no training rows; build it with a smaller --held-out or more text"
            )
    return indexes


class ShardReader:
    """Reads rows of several sources; checks each shard's sha256 the first time, and keeps copies of the remote ones that it used last."""

    def __init__(
        self, paths: Sequence[str], indexes: Sequence[Index], split: str = "train", on_bad_sample: str = "fail"
    ):
        self.paths, self.indexes, self.split = list(paths), list(indexes), split
        self._skips, self._findings = on_bad_sample == "skip", dict[tuple[int, int], str]()
        self._checked: set[tuple[int, int]] = set()
        self._copies: dict[tuple[int, int], BinaryIO] = {}

    def read(self, references: Sequence[SequenceReference]) -> list[DataSequence]:
        """The rows in the order of `references`; each shard is opened once and read front to back.

        With `on_bad_sample="skip"` rows of a shard that is missing or damaged are padding, with nothing in them to score, and say why: the
        rows around them, and their masks, are what they would be.

        Raises:
            DamageError: if a shard is missing or not what the index says, unless such are skipped.
        """
        wanted: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place, reference in enumerate(references):
            wanted[reference.source, reference.shard].append(place)
        rows: list[DataSequence | None] = [None] * len(references)
        for key, places in wanted.items():
            source, number = key
            shard = self.indexes[source].splits[self.split].shards[number]
            if key not in self._findings:
                try:
                    for place, row in self._rows_of(key, shard, {place: references[place].row for place in places}):
                        rows[place] = row
                    continue
                except DamageError as error:
                    if not self._skips:
                        raise
                    self._findings[key] = str(error)
            for place in places:
                rows[place] = _padding(self.indexes[source].sequence_length, source, shard.part, self._findings[key])
        return [row for row in rows if row is not None]

    def _rows_of(
        self, key: tuple[int, int], shard: Shard, numbers: dict[int, int]
    ) -> Iterator[tuple[int, DataSequence]]:
        """The rows of one shard, front to back, each with its place; `numbers` are those of the rows, by place."""
        source, sequence_length = key[0], self.indexes[key[0]].sequence_length
        try:
            with self._opened(*key, shard) as stream:
                for place, number in sorted(numbers.items(), key=lambda item: item[1]):
                    arrays = shards.read_row(stream, number, sequence_length)
                    where = f"row {number} of {storage.join(self.paths[source], shard.file)}"
                    yield (
                        place,
                        DataSequence(
                            arrays["input_ids"],
                            arrays["document_ids"],
                            arrays["num_bytes"],
                            source,
                            shard.part,
                            place=where,
                        ),
                    )
        except (EOFError, FileNotFoundError) as error:
            path = storage.join(self.paths[source], shard.file)
            raise DamageError(
                f"shard {path} was whole when it was checked, and no longer is ({error}); restore it"
            ) from error

    @contextmanager
    def _opened(self, source: int, number: int, shard: Shard) -> Iterator[BinaryIO]:
        """A checked shard: the file, or the copy of a remote one, because a request for every row would take longer than the whole shard."""
        path, key = storage.join(self.paths[source], shard.file), (source, number)
        if not storage.is_remote(path):
            if key not in self._checked:
                _check(path, shard)
                self._checked.add(key)
            with storage.open_input(path) as stream:
                yield stream
            return
        copy = self._copies.pop(key, None)
        if copy is None:
            copy = tempfile.TemporaryFile()  # closed when it is dropped
            _check(path, shard, copy)
        self._copies[key] = copy  # now the last one used
        sizes = [self.indexes[one].splits[self.split].shards[other].size_bytes for one, other in self._copies]
        while len(sizes) > 1 and sum(sizes) > _COPIES_BYTES:
            self._copies.pop(next(iter(self._copies))).close()
            sizes.pop(0)
        yield copy


def check_ids(rows: Sequence[DataSequence], mask_id: int | None, vocab_size: int) -> None:
    """Checks that a network with this mask token and V tokens can be trained on rows, and scored by them.

    Raises:
        UserError: if a row holds the mask token, whose probability is 0 by definition, or an id that is none of V; naming the place.
    """
    if not rows:
        return
    ids = np.stack([row.input_ids for row in rows])
    is_wrong = (ids >= vocab_size) | (ids == (-1 if mask_id is None else mask_id))
    is_wrong &= np.stack([row.document_ids for row in rows]) >= 0
    if is_wrong.any():
        number, position = (int(found) for found in np.argwhere(is_wrong)[0])
        found = int(ids[number, position])
        what = "which is the mask token" if found == mask_id else f"and the network has {vocab_size} tokens"
        raise UserError(
            f"position {position} of {rows[number].place} holds id {found}, {what}; change model.mask_token to an id that no text holds, or build "
            "the data with the network's tokenizer"
        )


def _padding(sequence_length: int, source: int, part: int, finding: str) -> DataSequence:
    zeros = np.zeros(sequence_length, dtype=np.int32)
    return DataSequence(zeros, zeros - 1, zeros, source, part, finding)


def _check(path: str, shard: Shard, copy: BinaryIO | None = None) -> None:
    """Raises DamageError unless the file is what the index says; copies it on the way."""
    if storage.size(path) is None:
        raise DamageError(
            f"shard {path} is missing (expected sha256 {shard.sha256}); restore it, or build the data again"
        )
    digest = hashlib.sha256()
    with storage.open_input(path) as stream:
        while block := stream.read(_BLOCK_BYTES):
            digest.update(block)
            if copy is not None:
                copy.write(block)
    if digest.hexdigest() != shard.sha256:
        raise DamageError(
            f"shard {path} is damaged: expected sha256 {shard.sha256}, found {digest.hexdigest()}; restore it, or build the data again"
        )


def shares(
    order: Order, cursor: Cursor, *, global_batch_size: int, rank: int, world_size: int, num_steps: int
) -> Iterator[tuple[list[list[SequenceReference]], list[Cursor]]]:
    """This rank's references of several steps at a time, and the cursor behind each step's global batch.

    A rank takes a contiguous share of every global batch; shares differ by a row at most.
    """
    steps_at_once = max(1, _READ_AHEAD_ROWS * world_size // global_batch_size)
    for first in range(0, num_steps, steps_at_once):
        references, cursors = [], []
        for _ in range(min(steps_at_once, num_steps - first)):
            places, cursor = order.places(cursor, global_batch_size)
            own = np.array_split(np.arange(global_batch_size), world_size)[rank]
            references.append(as_references(places[own]))
            cursors.append(cursor)
        yield references, cursors


def iterate_rows(
    reader: ShardReader,
    order: Order,
    cursor: Cursor,
    *,
    global_batch_size: int,
    rank: int,
    world_size: int,
    num_steps: int,
) -> Iterator[tuple[list[DataSequence], Cursor]]:
    """For each of the next `num_steps` steps: this rank's rows, and the cursor behind the whole global batch."""
    share = {"global_batch_size": global_batch_size, "rank": rank, "world_size": world_size, "num_steps": num_steps}
    for references, cursors in shares(order, cursor, **share):
        yield from zip(
            by_step(reader.read([one for step in references for one in step]), references), cursors, strict=True
        )


def by_step(
    rows: Sequence[DataSequence], references: Sequence[Sequence[SequenceReference]]
) -> Iterator[list[DataSequence]]:
    """Cuts rows that were read together into steps again."""
    start = 0
    for step in references:
        yield list(rows[start : start + len(step)])
        start += len(step)


def read_split(path: str, split: str, max_sequences: int | None = None) -> list[DataSequence]:
    """The rows of a split in the order of its files.

    Args:
        path: a data folder.
        split: train or held_out.
        max_sequences: evenly spaced ones if there are more, so that they stand for all documents.

    Raises:
        UserError: if there is no such split.
    """
    index = load_index(path)
    if split not in index.splits:
        raise UserError(f"{path} has no split {split!r}; it has {', '.join(index.splits)}")
    references = [
        SequenceReference(0, number, row)
        for number, shard in enumerate(index.splits[split].shards)
        for row in range(shard.rows)
    ]
    if max_sequences is not None and max_sequences < len(references):
        references = [references[len(references) * place // max_sequences] for place in range(max_sequences)]
    return ShardReader([path], [index], split).read(references)


def held_out_rows(sources: Sequence[Source], indexes: Sequence[Index], num_rows: int) -> list[DataSequence]:
    """Return `num_rows` held-out rows, as many of every source; where a source has fewer, the others make up for it."""
    available = [index.splits["held_out"].rows if "held_out" in index.splits else 0 for index in indexes]
    counts = [0] * len(available)
    for _ in range(min(num_rows, sum(available))):
        open_ones = [number for number, most in enumerate(available) if counts[number] < most]
        counts[min(open_ones, key=lambda number: counts[number])] += 1
    taken = [(source.path, count) for source, count in zip(sources, counts, strict=True) if count]
    return [row for path, count in taken for row in read_split(path, "held_out", count)]
