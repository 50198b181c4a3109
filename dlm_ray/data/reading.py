"""Read sequences by reference: every shard is checked when it is first used, and read in ascending order."""

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

# Sequences that one rank reads ahead at once; a larger number means fewer and longer reads of each shard.
_READ_AHEAD_SEQUENCES = 1024
# Disk space for a reader's local copies of remote shards; more than the shards of one window need.
_COPIES_BYTES = 4 * 2**30
_BLOCK_BYTES = 4 * 2**20


class DataSequence(NamedTuple):
    """One packed sequence; see `packing.PackedSequence`."""

    input_ids: np.ndarray
    document_ids: np.ndarray
    num_bytes: np.ndarray
    source: int
    chunk: int
    """Number of the `sources.SourceChunk`; with the document id, it identifies a document of the source."""
    finding: str = ""
    """For padding that replaces an unreadable sequence: the error of its shard."""
    place: str = ""
    """Shard and number of the sequence, for messages."""


def open_sources(sources: Sequence[Source]) -> list[Index]:
    """Return the indexes of all sources.

    Raises:
        UserError: if a source is not a data folder or has no training sequences, or if two sources differ in tokenizer,
            in start or end token, or in sequence length.
    """
    indexes = [load_index(source.path) for source in sources]
    for source, index in zip(sources, indexes, strict=True):
        _check_compatible(source.path, index, sources[0].path, indexes[0])
        if not index.splits["train"].sequences:
            raise UserError(
                f"data.sources: {source.path} has no training sequences; build it with a smaller `held_out` "
                "or more text"
            )
    return indexes


def _check_compatible(path: str, index: Index, first_path: str, first: Index) -> None:
    """Raise UserError unless the sequences of two data folders can be mixed."""
    tokenizer, expected = index.tokenizer, first.tokenizer
    if tokenizer.sha256 != expected.sha256:
        raise UserError(
            f"data.sources: {path} was built with tokenizer {tokenizer.name} (sha256 {tokenizer.sha256[:12]}) and "
            f"{first_path} with {expected.name} ({expected.sha256[:12]}); build both with the same `tokenizer`"
        )
    if index.sequence_length != first.sequence_length:
        raise UserError(
            f"data.sources: {path} has sequences of {index.sequence_length} tokens and {first_path} of "
            f"{first.sequence_length}; build both with the same `sequence_length`"
        )
    if (tokenizer.start_id, tokenizer.end_id) != (expected.start_id, expected.end_id):
        raise UserError(
            f"data.sources: {path} has start token {tokenizer.start_id} and end token {tokenizer.end_id}, and "
            f"{first_path} has {expected.start_id} and {expected.end_id}; build both with the same `tokenizer`"
        )


class ShardReader:
    """Reads sequences of several sources; checks each shard once, and keeps copies of recent remote shards.

    Args:
        paths: the data folder of each source.
        indexes: the index of each source.
        split: the split to read.
        on_bad_sample: `fail`, or `skip` to replace the sequences of a missing or damaged shard by padding.
    """

    def __init__(
        self, paths: Sequence[str], indexes: Sequence[Index], split: str = "train", on_bad_sample: str = "fail"
    ):
        self.paths, self.indexes, self.split = list(paths), list(indexes), split
        self._skips_bad_shards = on_bad_sample == "skip"
        self._findings: dict[tuple[int, int], str] = {}
        self._checked: set[tuple[int, int]] = set()
        self._copies: dict[tuple[int, int], BinaryIO] = {}

    def read(self, references: Sequence[SequenceReference]) -> list[DataSequence]:
        """Return the sequences in the order of `references`; each shard is opened once and read front to back.

        With `on_bad_sample="skip"`, a sequence of a missing or damaged shard becomes padding, with nothing to score and
        with a `finding`. The sequences around it, and their masks, stay the same.

        Raises:
            DamageError: if a shard is missing or differs from the index, unless bad shards are skipped.
        """
        slots_by_shard: dict[tuple[int, int], list[int]] = defaultdict(list)
        for slot, reference in enumerate(references):
            slots_by_shard[reference.source, reference.shard].append(slot)
        sequences: list[DataSequence | None] = [None] * len(references)
        for key, slots in slots_by_shard.items():
            source, number = key
            shard = self.indexes[source].splits[self.split].shards[number]
            if key not in self._findings:
                try:
                    for slot, sequence in self._read_shard(key, shard, {s: references[s].sequence for s in slots}):
                        sequences[slot] = sequence
                    continue
                except DamageError as error:
                    if not self._skips_bad_shards:
                        raise
                    self._findings[key] = str(error)
            padding = _padding(self.indexes[source].sequence_length, source, shard.part, self._findings[key])
            for slot in slots:
                sequences[slot] = padding
        return [sequence for sequence in sequences if sequence is not None]

    def _read_shard(
        self, key: tuple[int, int], shard: Shard, numbers: dict[int, int]
    ) -> Iterator[tuple[int, DataSequence]]:
        """Yield (slot, sequence) of one shard, front to back; `numbers` maps slots to numbers of sequences."""
        source, sequence_length = key[0], self.indexes[key[0]].sequence_length
        path = storage.join(self.paths[source], shard.file)
        try:
            with self._opened(*key, shard) as stream:
                for slot, number in sorted(numbers.items(), key=lambda item: item[1]):
                    arrays = shards.read_sequence(stream, number, sequence_length)
                    place = f"sequence {number} of {path}"
                    input_ids, document_ids, num_bytes = (arrays[name] for name in DataSequence._fields[:3])
                    yield slot, DataSequence(input_ids, document_ids, num_bytes, source, shard.part, place=place)
        except (EOFError, FileNotFoundError) as error:
            raise DamageError(
                f"shard {path} was complete when it was checked, and no longer is ({error}); restore it"
            ) from error

    @contextmanager
    def _opened(self, source: int, number: int, shard: Shard) -> Iterator[BinaryIO]:
        """Open a checked shard: the local file, or a copy of a remote one (one request per sequence is slower)."""
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
        self._copies[key] = copy  # the last one is the most recently used
        sizes = [self.indexes[i].splits[self.split].shards[j].size_bytes for i, j in self._copies]
        while len(sizes) > 1 and sum(sizes) > _COPIES_BYTES:
            self._copies.pop(next(iter(self._copies))).close()
            sizes.pop(0)
        yield copy


def check_ids(sequences: Sequence[DataSequence], mask_id: int | None, vocab_size: int) -> None:
    """Check that a network with this mask token and V tokens can be trained and evaluated on the sequences.

    Raises:
        UserError: if a sequence contains the mask token, whose probability is 0 by definition, or an id of V or more;
            the error names the place.
    """
    if not sequences:
        return
    ids = np.stack([sequence.input_ids for sequence in sequences])
    is_wrong = (ids >= vocab_size) | (ids == (-1 if mask_id is None else mask_id))
    is_wrong &= np.stack([sequence.document_ids for sequence in sequences]) >= 0
    if is_wrong.any():
        number, position = (int(index) for index in np.argwhere(is_wrong)[0])
        token = int(ids[number, position])
        reason = "which is the mask token" if token == mask_id else f"and the network has {vocab_size} tokens"
        raise UserError(
            f"position {position} of {sequences[number].place} holds id {token}, {reason}; change model.mask_token to "
            "an id that no text contains, or build the data with the network's tokenizer"
        )


def _padding(sequence_length: int, source: int, chunk: int, finding: str) -> DataSequence:
    """Return a sequence of padding that replaces an unreadable one."""
    zeros = np.zeros(sequence_length, dtype=np.int32)
    return DataSequence(zeros, zeros - 1, zeros, source, chunk, finding)


def _check(path: str, shard: Shard, copy: BinaryIO | None = None) -> None:
    """Raise DamageError unless the file has the sha256 of the index; write its content to `copy`, if given."""
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
            f"shard {path} is damaged: expected sha256 {shard.sha256}, found {digest.hexdigest()}; restore it, or "
            "build the data again"
        )


def rank_batches(
    order: Order, cursor: Cursor, *, global_batch_size: int, rank: int, world_size: int, num_steps: int
) -> Iterator[tuple[list[list[SequenceReference]], list[Cursor]]]:
    """Yield this rank's references of several steps at a time, and the cursor after each step's global batch.

    A rank takes a contiguous share of every global batch; the shares of two ranks differ by one sequence at most.
    """
    steps_at_once = max(1, _READ_AHEAD_SEQUENCES * world_size // global_batch_size)
    share = np.array_split(np.arange(global_batch_size), world_size)[rank]
    for first in range(0, num_steps, steps_at_once):
        references, cursors = [], []
        for _ in range(min(steps_at_once, num_steps - first)):
            places, cursor = order.places(cursor, global_batch_size)
            references.append(as_references(places[share]))
            cursors.append(cursor)
        yield references, cursors


def iterate_sequences(
    reader: ShardReader,
    order: Order,
    cursor: Cursor,
    *,
    global_batch_size: int,
    rank: int,
    world_size: int,
    num_steps: int,
) -> Iterator[tuple[list[DataSequence], Cursor]]:
    """Yield, for each of the next `num_steps` steps, this rank's sequences and the cursor after the global batch."""
    batches = rank_batches(
        order, cursor, global_batch_size=global_batch_size, rank=rank, world_size=world_size, num_steps=num_steps
    )
    for references, cursors in batches:
        sequences = reader.read([reference for step in references for reference in step])
        yield from zip(group_by_step(sequences, references), cursors, strict=True)


def group_by_step(
    sequences: Sequence[DataSequence], references: Sequence[Sequence[SequenceReference]]
) -> Iterator[list[DataSequence]]:
    """Yield the sequences of each step, from the sequences of several steps that were read together."""
    start = 0
    for step in references:
        yield list(sequences[start : start + len(step)])
        start += len(step)


def read_split(path: str, split: str, max_sequences: int | None = None) -> list[DataSequence]:
    """Return the sequences of a split in the order of its shards.

    Args:
        path: a data folder.
        split: `train` or `held_out`.
        max_sequences: return this many evenly spaced sequences if the split has more, so that they represent all
            documents.

    Raises:
        UserError: if the folder has no such split.
    """
    index = load_index(path)
    if split not in index.splits:
        raise UserError(f"{path} has no split {split!r}; it has {', '.join(index.splits)}")
    references = [
        SequenceReference(0, shard_number, number)
        for shard_number, shard in enumerate(index.splits[split].shards)
        for number in range(shard.sequences)
    ]
    if max_sequences is not None and max_sequences < len(references):
        references = [references[len(references) * i // max_sequences] for i in range(max_sequences)]
    return ShardReader([path], [index], split).read(references)


def held_out_sequences(sources: Sequence[Source], indexes: Sequence[Index], num_sequences: int) -> list[DataSequence]:
    """Return `num_sequences` held-out sequences, equally many per source; other sources replace what a source lacks."""
    available = [index.splits["held_out"].sequences if "held_out" in index.splits else 0 for index in indexes]
    counts = [0] * len(available)
    for _ in range(min(num_sequences, sum(available))):
        remaining = [number for number, limit in enumerate(available) if counts[number] < limit]
        counts[min(remaining, key=lambda number: counts[number])] += 1
    requests = [(source.path, count) for source, count in zip(sources, counts, strict=True) if count]
    return [sequence for path, count in requests for sequence in read_split(path, "held_out", count)]
