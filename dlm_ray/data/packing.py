"""Pack tokenized documents into sequences of exactly L tokens; no token is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PackedSequence(NamedTuple):
    """One sequence of L tokens."""

    input_ids: np.ndarray
    """[L] int32."""
    document_ids: np.ndarray
    """[L] int32: number of the document within its `sources.SourceChunk`; -1 for padding."""
    num_bytes: np.ndarray
    """[L] int32: raw UTF-8 bytes that the token stands for; 0 for start tokens, end-of-text tokens and padding."""


class Packer:
    """Fills one sequence after the other, so that it holds at most one incomplete sequence.

    Args:
        sequence_length: L, at least 3.
        start_id: the token that begins every segment.
        end_id: the token that ends every document. It also pads the last sequence, and any sequence with a single free
            position.
    """

    def __init__(self, sequence_length: int, start_id: int, end_id: int):
        assert sequence_length >= 3, "a sequence needs a start token and two more, so that no segment stays empty"
        self.sequence_length, self.start_id, self.end_id = sequence_length, start_id, end_id
        self._ids: list[int] = []
        self._document_ids: list[int] = []
        self._num_bytes: list[int] = []

    def add(self, number: int, tokens: Sequence[int], num_bytes: Sequence[int]) -> list[PackedSequence]:
        """Append document `number`, its token ids and the bytes of each token; return the complete sequences."""
        sequences = []
        tokens, num_bytes = [*tokens, self.end_id], [*num_bytes, 0]
        start = 0
        while start < len(tokens):
            if self.sequence_length - len(self._ids) < 2:  # no room for a start token and one more
                sequences += self.finish()
            count = min(len(tokens) - start, self.sequence_length - len(self._ids) - 1)
            self._ids += [self.start_id, *tokens[start : start + count]]
            self._document_ids += [number] * (count + 1)
            self._num_bytes += [0, *num_bytes[start : start + count]]
            start += count
        return sequences

    def finish(self) -> list[PackedSequence]:
        """Return the incomplete sequence, padded; an empty list if there is none."""
        if not self._ids:
            return []
        missing = self.sequence_length - len(self._ids)
        sequence = PackedSequence(
            np.array(self._ids + [self.end_id] * missing, dtype=np.int32),
            np.array(self._document_ids + [-1] * missing, dtype=np.int32),
            np.array(self._num_bytes + [0] * missing, dtype=np.int32),
        )
        self._ids, self._document_ids, self._num_bytes = [], [], []
        return [sequence]
