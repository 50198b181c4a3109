"""Documents as tokens -> rows of exactly L tokens, nothing dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PackedSequence(NamedTuple):
    """One row."""

    input_ids: np.ndarray
    """[L] int32."""
    document_ids: np.ndarray
    """[L] int32: number of the document within its part; -1 is padding."""
    num_bytes: np.ndarray
    """[L] int32: raw UTF-8 bytes that the token stands for; 0 for start tokens, end-of-text tokens and padding."""


class Packer:
    """Fills one row after the other, so that no more than a row is held.

    Args:
        sequence_length: L, at least 3.
        start_id: begins every segment.
        end_id: ends every document, and pads the last row, and any row with a single place left.
    """

    def __init__(self, sequence_length: int, start_id: int, end_id: int):
        assert sequence_length >= 3, "a row needs a start token and two more, so that a segment never stays empty"
        self.sequence_length, self.start_id, self.end_id = sequence_length, start_id, end_id
        self._ids: list[int] = []
        self._owners: list[int] = []
        self._sizes: list[int] = []

    def add(self, number: int, tokens: Sequence[int], num_bytes: Sequence[int]) -> list[PackedSequence]:
        """Appends a document (its number, token ids, and bytes of each token); returns the rows that it did not fit into any more."""
        rows = []
        tokens, num_bytes = [*tokens, self.end_id], [*num_bytes, 0]
        at = 0
        while at < len(tokens):
            if self.sequence_length - len(self._ids) < 2:  # no room for a start token and one more
                rows += self.finish()
            count = min(len(tokens) - at, self.sequence_length - len(self._ids) - 1)
            self._ids += [self.start_id, *tokens[at : at + count]]
            self._owners += [number] * (count + 1)
            self._sizes += [0, *num_bytes[at : at + count]]
            at += count
        return rows

    def finish(self) -> list[PackedSequence]:
        """The row that is being filled, padded, if anything is in it."""
        if not self._ids:
            return []
        missing = self.sequence_length - len(self._ids)
        row = PackedSequence(
            np.array(self._ids + [self.end_id] * missing, dtype=np.int32),
            np.array(self._owners + [-1] * missing, dtype=np.int32),
            np.array(self._sizes + [0] * missing, dtype=np.int32),
        )
        self._ids, self._owners, self._sizes = [], [], []
        return [row]
