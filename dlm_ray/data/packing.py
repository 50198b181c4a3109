"""Documents as tokens -> rows of exactly L tokens, nothing dropped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np


class PackedRow(NamedTuple):
    """One row."""

    input_ids: np.ndarray
    """[L] int32."""
    document_ids: np.ndarray
    """[L] int32: number of the document within its part; -1 is padding."""
    num_bytes: np.ndarray
    """[L] int32: raw UTF-8 bytes that the token stands for; 0 for start tokens, end-of-text tokens and padding."""


def pack(documents: Iterable[tuple[int, list[int], list[int]]], row_tokens: int, start_id: int, end_id: int) -> Iterator[PackedRow]:
    """Rows of `row_tokens` tokens; the last one is padded.

    Args:
        documents: (number, token ids, bytes of each token).
        row_tokens: L, at least 3.
        start_id: begins every segment.
        end_id: ends every document, and pads.
    """
    assert row_tokens >= 3, "a row needs a start token and two more, so that a segment never stays empty"
    ids: list[int] = []
    owners: list[int] = []
    sizes: list[int] = []
    for number, tokens, num_bytes in documents:
        tokens, num_bytes = [*tokens, end_id], [*num_bytes, 0]
        at = 0
        while at < len(tokens):
            if row_tokens - len(ids) < 2:  # no room for a start token and one more
                yield _row(ids, owners, sizes, row_tokens, end_id)
                ids, owners, sizes = [], [], []
            count = min(len(tokens) - at, row_tokens - len(ids) - 1)
            ids += [start_id, *tokens[at : at + count]]
            owners += [number] * (count + 1)
            sizes += [0, *num_bytes[at : at + count]]
            at += count
    if ids:
        yield _row(ids, owners, sizes, row_tokens, end_id)


def _row(ids: list[int], owners: list[int], sizes: list[int], row_tokens: int, end_id: int) -> PackedRow:
    missing = row_tokens - len(ids)
    return PackedRow(
        np.array(ids + [end_id] * missing, dtype=np.int32),
        np.array(owners + [-1] * missing, dtype=np.int32),
        np.array(sizes + [0] * missing, dtype=np.int32),
    )
