"""Build one chunk of a data folder: tokenize, split and pack its documents, and write its shards. Needs no Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from dlm_ray.config.errors import UserError
from dlm_ray.data import packing, shards, sources, storage
from dlm_ray.data.identity import TokenizerIdentity
from dlm_ray.data.index import FORMAT, NAME, Index
from dlm_ray.data.special_tokens import ControlTokenError
from dlm_ray.data.tokenizer import FastTokenizer, encode, identity, load_tokenizer

SPLITS = ("train", "held_out")
_ENCODE_DOCUMENTS = 64


@dataclass(frozen=True)
class Settings:
    """The settings that, with the documents, determine the bytes of the shards."""

    tokenizer_sha256: str
    sequence_length: int
    held_out: float
    text_field: str
    sequences_per_shard: int


class ChunkShard(shards.ShardFields):
    """The entry of a shard in an index, with the number of its chunk."""

    part: int


class SplitResult(TypedDict):
    """The counts and the shards of one split, of one chunk or of the whole folder."""

    sequences: int
    tokens: int
    bytes: int
    documents: int
    shards: list[ChunkShard]


ChunkResult = dict[str, SplitResult]
"""What a chunk adds to each split, by the split's name."""


def build_chunk(chunk: sources.SourceChunk, tokenizer_folder: str, settings: Settings, out: str) -> ChunkResult:
    """Write the shards of one chunk, then its marker, which tells a later build that the shards are complete.

    Returns:
        The counts and the shards of each split.
    """
    done = finished_chunk(chunk, settings, out)
    if done is not None:
        return done
    tokenizer = load_tokenizer(tokenizer_folder)
    writers = {split: _SplitWriter(split, chunk.number, settings, identity(tokenizer), out) for split in SPLITS}
    for number, text, tokens, num_bytes in _encoded(sources.located_documents(chunk, settings.text_field), tokenizer):
        if tokens:
            writers[split_of(text, settings.held_out)].add(number, tokens, num_bytes)
    result = {split: writer.finish() for split, writer in writers.items()}
    marker = {"inputs": _fingerprint(chunk, settings), "result": result}
    storage.write(_marker(chunk, out), json.dumps(marker, sort_keys=True).encode())
    return result


def write_index(
    out: str,
    results: Sequence[ChunkResult],
    sequence_length: int,
    tokenizer: TokenizerIdentity,
    built_from: Mapping[str, object],
) -> Index:
    """Write index.json, which makes `out` a data folder, from the results of all chunks in order."""
    splits = {}
    for split in SPLITS:
        by_chunk = [result[split] for result in results]
        splits[split] = SplitResult(
            sequences=sum(result["sequences"] for result in by_chunk),
            tokens=sum(result["tokens"] for result in by_chunk),
            bytes=sum(result["bytes"] for result in by_chunk),
            documents=sum(result["documents"] for result in by_chunk),
            shards=[shard for result in by_chunk for shard in result["shards"]],
        )
    fields = {
        "format": FORMAT,
        "sequence_length": sequence_length,
        "tokenizer": tokenizer.as_dict(),
        "splits": splits,
        "built_from": built_from,
    }
    index = Index.model_validate(fields)
    storage.write(storage.join(out, NAME), json.dumps(index.model_dump(), indent=1, sort_keys=True).encode())
    return index


def finished_chunk(chunk: sources.SourceChunk, settings: Settings, out: str) -> ChunkResult | None:
    """Return an earlier build's result of this chunk; None if its inputs, settings or shard sizes differ."""
    name = _marker(chunk, out)
    if not storage.exists(name):
        return None
    marker = json.loads(storage.read(name))
    if marker["inputs"] != _fingerprint(chunk, settings):
        return None
    result: ChunkResult = marker["result"]
    shards = [shard for split in result.values() for shard in split["shards"]]
    is_complete = all(storage.size(storage.join(out, shard["file"])) == shard["size_bytes"] for shard in shards)
    return result if is_complete else None


def split_of(text: str, held_out: float) -> str:
    """Return `held_out` for a share of documents, else `train`; the hash of the text decides, also for copies."""
    digest = hashlib.sha256(text.encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") < held_out * 2**64 else "train"


def _encoded(
    documents: Iterable[tuple[str, str]], tokenizer: FastTokenizer
) -> Iterator[tuple[int, str, list[int], list[int]]]:
    """Yield (number, text, tokens, bytes of each token) for (place, text) pairs; encode several documents at a time."""
    batch: list[tuple[str, str]] = []
    number = 0

    def flush() -> Iterator[tuple[int, str, list[int], list[int]]]:
        try:
            encoded = encode(tokenizer, [text for _, text in batch])
        except ControlTokenError as error:
            raise UserError(f"{batch[error.number][0]}, {error}") from error
        for i, (tokens, num_bytes) in enumerate(encoded):
            yield number + i, batch[i][1], tokens, num_bytes

    for document in documents:
        batch.append(document)
        if len(batch) == _ENCODE_DOCUMENTS:
            yield from flush()
            number, batch = number + len(batch), []
    yield from flush()


class _SplitWriter:
    """Packs the documents of one split of one chunk, and writes a shard whenever enough sequences are complete."""

    def __init__(self, split: str, chunk: int, settings: Settings, tokenizer: TokenizerIdentity, out: str):
        self._name, self._chunk, self._out = f"{split}-{chunk:05d}", chunk, out
        self._sequences_per_shard = settings.sequences_per_shard
        self._packer = packing.Packer(settings.sequence_length, tokenizer.start_id, tokenizer.end_id)
        self._sequences: list[packing.PackedSequence] = []
        self._shards: list[ChunkShard] = []
        self._documents = self._tokens = self._bytes = 0

    def add(self, number: int, tokens: list[int], num_bytes: list[int]) -> None:
        """Add document `number` of the chunk."""
        self._documents += 1
        self._tokens += len(tokens) + 1  # its end-of-text token is scored
        self._bytes += sum(num_bytes)
        self._sequences += self._packer.add(number, tokens, num_bytes)
        while len(self._sequences) >= self._sequences_per_shard:
            self._write()

    def finish(self) -> SplitResult:
        """Write the remaining sequences; return the sequences, tokens, bytes, documents and shards of the split."""
        self._sequences += self._packer.finish()
        while self._sequences:
            self._write()
        num_sequences = sum(shard["sequences"] for shard in self._shards)
        return {
            "documents": self._documents,
            "tokens": self._tokens,
            "bytes": self._bytes,
            "sequences": num_sequences,
            "shards": self._shards,
        }

    def _write(self) -> None:
        name = f"{self._name}-{len(self._shards):05d}.tar"
        shard = shards.write_shard(self._out, name, self._sequences[: self._sequences_per_shard])
        self._shards.append({"part": self._chunk, **shard})
        self._sequences = self._sequences[self._sequences_per_shard :]


def _marker(chunk: sources.SourceChunk, out: str) -> str:
    return storage.join(out, f"parts/{chunk.number:05d}.json")


def _fingerprint(chunk: sources.SourceChunk, settings: Settings) -> str:
    """Return the sha256 of the settings and of the content of every file that the chunk reads."""
    digest = hashlib.sha256(json.dumps([chunk.as_dict(), vars(settings)], sort_keys=True).encode())
    for piece in chunk.pieces:
        with open(piece.path, "rb") as stream:
            if piece.kind == "jsonl":
                # The previous byte decides whether a line begins here, and the last line may continue in the next
                # piece.
                before = max(0, piece.first - 1)
                stream.seek(before)
                digest.update(stream.read(piece.last - before))
                digest.update(stream.readline())
            else:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
