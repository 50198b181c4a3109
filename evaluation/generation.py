"""Statistics of generated text: how much of it stands in real text, and how much it repeats itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dlm_ray.data.reading import read_split
from dlm_ray.data.tokenizer import encode_text
from dlm_ray.diffusion.draws import maskable_positions


def ngram_statistics(texts: Sequence[str], tokenizer: Any, data: str) -> dict[str, float]:
    """Of the token 4-grams of `texts`, the share that occurs in the held-out split; and distinct-2.

    Args:
        texts: generated.
        tokenizer: of the data folder.
        data: the data folder.

    Returns:
        num_samples, held_out_4grams (share in 0..1), distinct_2 (different bigrams over all bigrams).
    """
    rows = read_split(data, "held_out")
    known = set(_ngrams((row.input_ids[maskable_positions(row.document_ids[None])[0]].tolist() for row in rows), 4))
    encoded = [encode_text(tokenizer, text) for text in texts]
    fours, twos = list(_ngrams(encoded, 4)), list(_ngrams(encoded, 2))
    return {
        "num_samples": len(texts),
        "held_out_4grams": sum(gram in known for gram in fours) / max(1, len(fours)),
        "distinct_2": len(set(twos)) / max(1, len(twos)),
    }


def _ngrams(sequences: Iterable[Sequence[int]], n: int) -> Iterable[tuple[int, ...]]:
    for sequence in sequences:
        for start in range(len(sequence) - n + 1):
            yield tuple(sequence[start : start + n])
