"""One part of a data folder: its documents tokenised, split, packed and written as shards of its own. Without Ray, which only calls it many times."""

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
    """What the bytes of the shards depend on, besides the documents."""

    tokenizer_sha256: str
    sequence_length: int
    held_out: float
    text_field: str
    sequences_per_shard: int


def build_part(part: sources.SourceChunk, tokenizer_folder: str, settings: Settings, out: str) -> dict[str, Any]:
    """Writes the shards of one part and then its marker, by which a later build knows that they are whole.

    Returns:
        By split: rows, tokens, bytes, documents and the shards, as in the index.
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
    """Writes index.json, which makes `out` a data folder, from the results of all parts in their order."""
    splits = {}
    for split in SPLITS:
        parts = [result[split] for result in results]
        sums = {key: sum(part[key] for part in parts) for key in ("rows", "tokens", "bytes", "documents")}
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
    """What an earlier build wrote of this part, if its inputs and settings were the same and its shards are there in full size."""
    name = _marker(part, out)
    if not storage.exists(name):
        return None
    marker = json.loads(storage.read(name))
    if marker["inputs"] != _fingerprint(part, settings):
        return None
    result: dict[str, Any] = marker["result"]
    written = [shard for split in result.values() for shard in split["shards"]]
    return (
        result
        if all(storage.size(storage.join(out, shard["file"])) == shard["size_bytes"] for shard in written)
        else None
    )


def split_of(text: str, held_out: float) -> str:
    """`held_out` for a share of documents, chosen by the hash of their text: a document never stands in both, and neither do its copies."""
    digest = hashlib.sha256(text.encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") < held_out * 2**64 else "train"


def _encoded(documents: Iterable[tuple[str, str]], tokenizer: Any) -> Iterator[tuple[int, str, list[int], list[int]]]:
    """(number, text, tokens, bytes of each token) of (place, text), several documents at a time."""
    waiting: list[tuple[str, str]] = []
    number = 0

    def flush() -> Iterator[tuple[int, str, list[int], list[int]]]:
        try:
            encoded = encode(tokenizer, [text for _, text in waiting])
        except ControlTokenError as error:
            raise UserError(f"{waiting[error.number][0]}, {error}") from error
        for i, (tokens, num_bytes) in enumerate(encoded):
            yield number + i, waiting[i][1], tokens, num_bytes

    for document in documents:
        waiting.append(document)
        if len(waiting) == _ENCODE_DOCUMENTS:
            yield from flush()
            number, waiting = number + len(waiting), []
    yield from flush()


class _SplitWriter:
    """Packs the documents of one split of one part, and writes a shard whenever its rows are full."""

    def __init__(self, split: str, part: int, settings: Settings, tokenizer: TokenizerIdentity, out: str):
        self._name, self._part, self._out = f"{split}-{part:05d}", part, out
        self._rows_per_shard = settings.sequences_per_shard
        self._packer = packing.Packer(settings.sequence_length, tokenizer.start_id, tokenizer.end_id)
        self._rows: list[packing.PackedSequence] = []
        self._shards: list[dict[str, Any]] = []
        self._sums = {"documents": 0, "tokens": 0, "bytes": 0}

    def add(self, number: int, tokens: list[int], num_bytes: list[int]) -> None:
        """Document number `number` of the part."""
        self._sums["documents"] += 1
        self._sums["tokens"] += len(tokens) + 1  # its end-of-text token is scored
        self._sums["bytes"] += sum(num_bytes)
        self._rows += self._packer.add(number, tokens, num_bytes)
        while len(self._rows) >= self._rows_per_shard:
            self._write()

    def finish(self) -> dict[str, Any]:
        """Writes what is left; rows, tokens, bytes, documents and the shards."""
        self._rows += self._packer.finish()
        while self._rows:
            self._write()
        return {**self._sums, "rows": sum(shard["rows"] for shard in self._shards), "shards": self._shards}

    def _write(self) -> None:
        name = f"{self._name}-{len(self._shards):05d}.tar"
        self._shards.append(
            {"part": self._part, **shards.write_shard(self._out, name, self._rows[: self._rows_per_shard])}
        )
        self._rows = self._rows[self._rows_per_shard :]


def _marker(part: sources.SourceChunk, out: str) -> str:
    return storage.join(out, f"parts/{part.number:05d}.json")


def _fingerprint(part: sources.SourceChunk, settings: Settings) -> str:
    """Of the settings, and of the content of every file that the part reads."""
    digest = hashlib.sha256(json.dumps([part.as_dict(), vars(settings)], sort_keys=True).encode())
    for piece in part.pieces:
        with open(piece.path, "rb") as stream:
            if piece.kind == "jsonl":
                # The byte before decides whether a line begins here, and the last line may run on into the next piece.
                before = max(0, piece.first - 1)
                stream.seek(before)
                digest.update(stream.read(piece.last - before))
                digest.update(stream.readline())
            else:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
