"""What a data folder holds, for people: counts, and the first rows as text."""

from __future__ import annotations

from typing import Any

from dlm_ray.data.index import load_data_tokenizer, load_index
from dlm_ray.data.reading import DataSequence, read_split


def describe(path: str, num_rows: int = 2) -> dict[str, Any]:
    """DataSequence length, tokenizer and splits of a data folder, and its first rows decoded segment by segment."""
    index = load_index(path)
    described: dict[str, Any] = {
        "path": path,
        "sequence_length": index.sequence_length,
        "tokenizer": index.tokenizer.as_dict(),
        "splits": {},
    }
    for name, split in index.splits.items():
        described["splits"][name] = {
            "rows": split.rows,
            "documents": split.documents,
            "tokens": split.tokens,
            "bytes": split.bytes,
            "bytes_per_token": round(split.bytes / split.tokens, 3) if split.tokens else None,
            "shards": len(split.shards),
        }
    if index.splits["train"].rows:
        tokenizer = load_data_tokenizer(path)
        described["first_rows"] = [_segments(row, tokenizer) for row in read_split(path, "train", num_rows)]
    return described


def _segments(row: DataSequence, tokenizer: Any) -> list[dict[str, Any]]:
    """The documents of one row, in order."""
    segments = []
    for document in dict.fromkeys(row.document_ids.tolist()):
        ids = row.input_ids[row.document_ids == document].tolist()
        segments.append(
            {"document": document, "tokens": len(ids), "text": "" if document < 0 else tokenizer.decode(ids)}
        )
    return segments
