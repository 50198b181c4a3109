"""One part of a data folder: its documents tokenised, split, packed and written as shards of its own. Without Ray, which only calls it many times."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dlm_ray.data import packing, shards, sources, storage
from dlm_ray.data.index import FORMAT, NAME, Index
from dlm_ray.data.tokenizer import TokenizerIdentity, encode, identity, load_tokenizer

SPLITS = ("train", "held_out")
_ENCODE_DOCUMENTS = 64


@dataclass(frozen=True)
class Settings:
    """What the bytes of the shards depend on, besides the documents."""

    tokenizer_sha256: str
    row_tokens: int
    held_out: float
    text_field: str
    rows_per_shard: int


def build_part(part: sources.Part, tokenizer_folder: str, settings: Settings, out: str) -> dict[str, Any]:
    """Writes the shards of one part and then its marker, by which a later build knows that they are whole.

    Returns:
        By split: rows, tokens, bytes, documents and the shards, as in the index.
    """
    done = finished_part(part, settings, out)
    if done is not None:
        return done
    tokenizer = load_tokenizer(tokenizer_folder)
    by_split: dict[str, list[tuple[int, list[int], list[int]]]] = {split: [] for split in SPLITS}
    for number, text, tokens, num_bytes in _encoded(sources.documents(part, settings.text_field), tokenizer):
        if tokens:
            by_split[split_of(text, settings.held_out)].append((number, tokens, num_bytes))
    ids = identity(tokenizer)
    result = {}
    for split, documents in by_split.items():
        rows = packing.pack(documents, settings.row_tokens, ids.start_id, ids.end_id)
        written = list(_write(rows, split, part.number, settings.rows_per_shard, out))
        result[split] = {
            "rows": sum(shard["rows"] for shard in written),
            "tokens": sum(len(tokens) + 1 for _, tokens, _ in documents),
            "bytes": sum(sum(num_bytes) for _, _, num_bytes in documents),
            "documents": len(documents),
            "shards": written,
        }
    marker = {"inputs": _fingerprint(part, settings), "result": result}
    storage.write(_marker(part, out), json.dumps(marker, sort_keys=True).encode())
    return result


def write_index(
    out: str, results: Sequence[dict[str, Any]], row_tokens: int, tokenizer: TokenizerIdentity, built_from: dict[str, Any]
) -> Index:
    """Writes index.json, which makes `out` a data folder, from the results of all parts in their order."""
    splits = {}
    for split in SPLITS:
        parts = [result[split] for result in results]
        sums = {key: sum(part[key] for part in parts) for key in ("rows", "tokens", "bytes", "documents")}
        splits[split] = {**sums, "shards": [shard for part in parts for shard in part["shards"]]}
    fields = {"format": FORMAT, "row_tokens": row_tokens, "tokenizer": tokenizer.as_dict(), "splits": splits, "built_from": built_from}
    index = Index.model_validate(fields)
    storage.write(storage.join(out, NAME), json.dumps(index.model_dump(), indent=1, sort_keys=True).encode())
    return index


def finished_part(part: sources.Part, settings: Settings, out: str) -> dict[str, Any] | None:
    """What an earlier build wrote of this part, if its inputs and settings were the same and its shards are there in full size."""
    name = _marker(part, out)
    if not storage.exists(name):
        return None
    marker = json.loads(storage.read(name))
    if marker["inputs"] != _fingerprint(part, settings):
        return None
    result: dict[str, Any] = marker["result"]
    written = [shard for split in result.values() for shard in split["shards"]]
    return result if all(storage.size(storage.join(out, shard["file"])) == shard["size_bytes"] for shard in written) else None


def split_of(text: str, held_out: float) -> str:
    """`held_out` for a share of documents, chosen by the hash of their text: a document never stands in both, and neither do its copies."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") < held_out * 2**64 else "train"


def _encoded(documents: Iterable[str], tokenizer: Any) -> Iterator[tuple[int, str, list[int], list[int]]]:
    """(number, text, tokens, bytes of each token), several documents at a time."""
    waiting: list[str] = []
    number = 0

    def flush() -> Iterator[tuple[int, str, list[int], list[int]]]:
        for i, (tokens, num_bytes) in enumerate(encode(tokenizer, waiting)):
            yield number + i, waiting[i], tokens, num_bytes

    for text in documents:
        waiting.append(text)
        if len(waiting) == _ENCODE_DOCUMENTS:
            yield from flush()
            number, waiting = number + len(waiting), []
    yield from flush()


def _write(rows: Iterable[packing.PackedRow], split: str, part: int, rows_per_shard: int, out: str) -> Iterator[dict[str, Any]]:
    waiting: list[packing.PackedRow] = []
    number = 0

    def flush() -> dict[str, Any]:
        return {"part": part, **shards.write_shard(out, f"{split}-{part:05d}-{number:05d}.tar", waiting)}

    for row in rows:
        waiting.append(row)
        if len(waiting) == rows_per_shard:
            yield flush()
            number, waiting = number + 1, []
    if waiting:
        yield flush()


def _marker(part: sources.Part, out: str) -> str:
    return storage.join(out, f"parts/{part.number:05d}.json")


def _fingerprint(part: sources.Part, settings: Settings) -> str:
    """Of the settings, and of the content of every file that the part reads."""
    digest = hashlib.sha256(json.dumps([part.as_dict(), vars(settings)], sort_keys=True).encode())
    for piece in part.pieces:
        with open(piece.path, "rb") as stream:
            if piece.kind == "jsonl":
                stream.seek(piece.first)
                digest.update(stream.read(piece.last - piece.first))
            else:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
