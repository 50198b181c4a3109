"""A summary of a data folder for people: counts, and the first sequences as text."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from dlm_ray.config.manifest_fields import TokenizerFields
from dlm_ray.data.index import load_data_tokenizer, load_index
from dlm_ray.data.reading import DataSequence, read_split
from dlm_ray.data.tokenizer import FastTokenizer


class SplitSummary(TypedDict):
    """The counts of one split."""

    sequences: int
    documents: int
    tokens: int
    bytes: int
    bytes_per_token: float | None
    shards: int


class SegmentSummary(TypedDict):
    """One segment of a sequence, as text."""

    document: int
    tokens: int
    text: str


class DataSummary(TypedDict):
    """What a data folder holds."""

    path: str
    sequence_length: int
    tokenizer: TokenizerFields
    splits: dict[str, SplitSummary]
    first_sequences: NotRequired[list[list[SegmentSummary]]]
    """The segments of the first training sequences; absent if there are none."""


def describe(path: str, num_sequences: int = 2) -> DataSummary:
    """Return the sequence length, tokenizer and splits of a data folder, and its first sequences decoded by segment."""
    index = load_index(path)
    splits: dict[str, SplitSummary] = {
        name: {
            "sequences": split.sequences,
            "documents": split.documents,
            "tokens": split.tokens,
            "bytes": split.bytes,
            "bytes_per_token": round(split.bytes / split.tokens, 3) if split.tokens else None,
            "shards": len(split.shards),
        }
        for name, split in index.splits.items()
    }
    summary: DataSummary = {
        "path": path,
        "sequence_length": index.sequence_length,
        "tokenizer": index.tokenizer.as_dict(),
        "splits": splits,
    }
    if index.splits["train"].sequences:
        tokenizer = load_data_tokenizer(path)
        sequences = read_split(path, "train", num_sequences)
        summary["first_sequences"] = [_segments(sequence, tokenizer) for sequence in sequences]
    return summary


def _segments(sequence: DataSequence, tokenizer: FastTokenizer) -> list[SegmentSummary]:
    """Return the document number, token count and text of every segment, in order; padding has a negative number."""
    segments: list[SegmentSummary] = []
    for document in dict.fromkeys(sequence.document_ids.tolist()):
        ids = sequence.input_ids[sequence.document_ids == document].tolist()
        text = "" if document < 0 else str(tokenizer.decode(ids))
        segments.append({"document": document, "tokens": len(ids), "text": text})
    return segments
