"""What a model makes of held-out text, document by document, so that two models can be compared in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dlm_ray.diffusion import likelihood


@dataclass(frozen=True)
class Scored:
    """Nats and bytes by document."""

    nats: np.ndarray
    """[documents] the (bound on the) nats of each."""
    num_bytes: np.ndarray
    """[documents] raw UTF-8 bytes of the scored text."""
    draw_totals: np.ndarray
    """[draws] nats of all documents by each draw alone."""
    num_tokens: int
    is_bound: bool

    @property
    def bits_per_byte(self) -> float:
        """Of all documents together."""
        return likelihood.bits_per_byte(float(self.nats.sum()), float(self.num_bytes.sum()))

    def as_dict(self) -> dict[str, Any]:
        """bits_per_byte with its intervals, and what they are over; an interval over one document or one draw is None."""
        return {
            "bits_per_byte": self.bits_per_byte,
            "is_bound": self.is_bound,
            "ci95_documents": likelihood.documents_interval(self.nats, self.num_bytes),
            "ci95_draws": likelihood.draws_interval(self.draw_totals, float(self.num_bytes.sum())),
            "documents": len(self.nats),
            "tokens": self.num_tokens,
            "bytes": int(self.num_bytes.sum()),
            "draws_per_sequence": len(self.draw_totals),
        }

    def minus(self, other: Scored) -> dict[str, Any]:
        """This model's bits per byte less the other's, with the paired interval over documents (None if there is one document)."""
        assert (self.num_bytes == other.num_bytes).all(), "a paired comparison needs the same documents"
        difference = self.nats - other.nats
        return {
            "bits_per_byte": likelihood.bits_per_byte(float(difference.sum()), float(self.num_bytes.sum())),
            "ci95_documents_paired": likelihood.documents_interval(difference, self.num_bytes),
        }


def number_documents(parts: Sequence[int], document_ids: np.ndarray) -> np.ndarray:
    """[N, L] numbers of documents over all rows, -1 for padding: the ids in a row count within the row's part."""
    numbers: dict[tuple[int, int], int] = {}
    numbered = np.full(document_ids.shape, -1)
    for row, (part, ids) in enumerate(zip(parts, document_ids, strict=True)):
        for document in np.unique(ids[ids >= 0]):
            numbered[row, ids == document] = numbers.setdefault((part, int(document)), len(numbers))
    return numbered
