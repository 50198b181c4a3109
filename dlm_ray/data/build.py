"""Build one part of a data folder: tokenize, split and pack its documents, and write its shards. Needs no Ray."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dlm_ray.config.errors import UserError
from dlm_ray.data import packing, shards, sources, storage
from dlm_ray.data.index import FORMAT, NAME, Index
from dlm_ray.data.special_tokens import ControlTokenError
from dlm_ray.data.tokenizer import TokenizerIdentity, encode, identity, load_tokenizer

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


def build_part(part: sources.SourceChunk, tokenizer_folder: str, settings: Settings, out: str) -> dict[str, Any]:
    """Write the shards of one part, then its marker, which tells a later build that the shards are complete.

    Returns:
        By split: sequences, tokens, bytes, documents and the shards, as in the index.
    """
    done = finished_part(part, settings, out)
    if done is not None:
        return done
    tokenizer = load_tokenizer(tokenizer_folder)
    writers = {split: _SplitWriter(split, part.number, settings, identity(tokenizer), out) for split in SPLITS}
    for number, text, tokens, num_bytes in _encoded(sources.located_documents(part, settings.text_field), tokenizer):
        if tokens:
            writers[split_of(text, settings.held_out)].add(number, tokens, num_bytes)
    result = {split: writer.finish() for split, writer in writers.items()}
    marker = {"inputs": _fingerprint(part, settings), "result": result}
    storage.write(_marker(part, out), json.dumps(marker, sort_keys=True).encode())
    return result


def write_index(
    out: str,
    results: Sequence[dict[str, Any]],
    sequence_length: int,
    tokenizer: TokenizerIdentity,
    built_from: dict[str, Any],
) -> Index:
    """Write index.json, which makes `out` a data folder, from the results of all parts in order."""
    splits = {}
    for split in SPLITS:
        parts = [result[split] for result in results]
        sums = {key: sum(part[key] for part in parts) for key in ("sequences", "tokens", "bytes", "documents")}
        splits[split] = {**sums, "shards": [shard for part in parts for shard in part["shards"]]}
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


def finished_part(part: sources.SourceChunk, settings: Settings, out: str) -> dict[str, Any] | None:
    """Return an earlier build's result of this part; None if its inputs, settings or shard sizes differ."""
    name = _marker(part, out)
    if not storage.exists(name):
        return None
    marker = json.loads(storage.read(name))
    if marker["inputs"] != _fingerprint(part, settings):
        return None
    result: dict[str, Any] = marker["result"]
    shards = [shard for split in result.values() for shard in split["shards"]]
    is_complete = all(storage.size(storage.join(out, shard["file"])) == shard["size_bytes"] for shard in shards)
    return result if is_complete else None


def split_of(text: str, held_out: float) -> str:
    """Return `held_out` for a share of documents, else `train`; the hash of the text decides, also for copies."""
    digest = hashlib.sha256(text.encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") < held_out * 2**64 else "train"


def _encoded(documents: Iterable[tuple[str, str]], tokenizer: Any) -> Iterator[tuple[int, str, list[int], list[int]]]:
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
    """Packs the documents of one split of one part, and writes a shard whenever enough sequences are complete."""

    def __init__(self, split: str, part: int, settings: Settings, tokenizer: TokenizerIdentity, out: str):
        self._name, self._part, self._out = f"{split}-{part:05d}", part, out
        self._sequences_per_shard = settings.sequences_per_shard
        self._packer = packing.Packer(settings.sequence_length, tokenizer.start_id, tokenizer.end_id)
        self._sequences: list[packing.PackedSequence] = []
        self._shards: list[dict[str, Any]] = []
        self._sums = {"documents": 0, "tokens": 0, "bytes": 0}

    def add(self, number: int, tokens: list[int], num_bytes: list[int]) -> None:
        """Add document `number` of the part."""
        self._sums["documents"] += 1
        self._sums["tokens"] += len(tokens) + 1  # its end-of-text token is scored
        self._sums["bytes"] += sum(num_bytes)
        self._sequences += self._packer.add(number, tokens, num_bytes)
        while len(self._sequences) >= self._sequences_per_shard:
            self._write()

    def finish(self) -> dict[str, Any]:
        """Write the remaining sequences; return the sequences, tokens, bytes, documents and shards of the split."""
        self._sequences += self._packer.finish()
        while self._sequences:
            self._write()
        num_sequences = sum(shard["sequences"] for shard in self._shards)
        return {**self._sums, "sequences": num_sequences, "shards": self._shards}

    def _write(self) -> None:
        name = f"{self._name}-{len(self._shards):05d}.tar"
        shard = shards.write_shard(self._out, name, self._sequences[: self._sequences_per_shard])
        self._shards.append({"part": self._part, **shard})
        self._sequences = self._sequences[self._sequences_per_shard :]


def _marker(part: sources.SourceChunk, out: str) -> str:
    return storage.join(out, f"parts/{part.number:05d}.json")


def _fingerprint(part: sources.SourceChunk, settings: Settings) -> str:
    """Return the sha256 of the settings and of the content of every file that the part reads."""
    digest = hashlib.sha256(json.dumps([part.as_dict(), vars(settings)], sort_keys=True).encode())
    for piece in part.pieces:
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
