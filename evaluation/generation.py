"""Statistics of generated text: the share of its n-grams that occur in real text, and its repetitiveness."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dlm_ray.evaluation.text_baselines import text_tokens

from dlm_ray.data.reading import read_split
from dlm_ray.data.tokenizer import encode_text


def ngram_statistics(texts: Sequence[str], tokenizer: Any, data: str) -> dict[str, float]:
    """Return n-gram statistics of generated texts.

    Args:
        texts: the generated texts.
        tokenizer: the tokenizer of the data folder.
        data: the data folder, whose held-out split is the real text.

    Returns:
        num_samples; held_out_4grams, the share (0 to 1) of the texts' token 4-grams that occur in the held-out split;
        distinct_2, the number of different bigrams over the number of bigrams.
    """
    known = set(_ngrams((text_tokens(sequence).tolist() for sequence in read_split(data, "held_out")), 4))
    encoded = [encode_text(tokenizer, text) for text in texts]
    fourgrams, bigrams = list(_ngrams(encoded, 4)), list(_ngrams(encoded, 2))
    return {
        "num_samples": len(texts),
        "held_out_4grams": sum(gram in known for gram in fourgrams) / max(1, len(fourgrams)),
        "distinct_2": len(set(bigrams)) / max(1, len(bigrams)),
    }


def _ngrams(sequences: Iterable[Sequence[int]], n: int) -> Iterator[tuple[int, ...]]:
    """Yield all runs of n tokens of each sequence."""
    for sequence in sequences:
        for start in range(len(sequence) - n + 1):
            yield tuple(sequence[start : start + n])
