"""Baselines on held-out text: unigram frequencies counted by hand, xz of the same text, and n-gram statistics."""

import lzma
import math
from collections import Counter

import pytest
from dlm_ray.evaluation.generation import ngram_statistics
from dlm_ray.evaluation.text_baselines import unigram_score, xz_bits_per_byte
from helpers.data import make_documents

from dlm_ray.data.build import split_of
from dlm_ray.data.index import load_data_tokenizer, load_index
from dlm_ray.data.reading import read_split
from dlm_ray.diffusion.draws import maskable_positions


def tokens(data_folder, split):
    return [
        int(token)
        for sequence in read_split(data_folder, split)
        for token in sequence.input_ids[maskable_positions(sequence.document_ids[None])[0]]
    ]


def test_the_unigram_score_is_the_cross_entropy_with_training_frequencies(data_folder):
    counts, vocab = Counter(tokens(data_folder, "train")), load_index(data_folder).tokenizer.vocab_size
    total = sum(counts.values()) + vocab
    bits = sum(-math.log2((counts[token] + 1) / total) for token in tokens(data_folder, "held_out"))
    scored = unigram_score(data_folder)
    assert scored.bits_per_byte == pytest.approx(bits / load_index(data_folder).splits["held_out"].bytes)
    assert len(scored.nats) == load_index(data_folder).splits["held_out"].documents


def test_xz_compresses_the_held_out_text(data_folder):
    texts = [text for part in (0, 1) for text in make_documents()[part::2] if split_of(text, 0.2) == "held_out"]
    content = "".join(texts).encode()
    assert xz_bits_per_byte(data_folder) == pytest.approx(8 * len(lzma.compress(content, preset=9)) / len(content))


def test_ngram_statistics_tell_known_from_repetitive_texts(data_folder):
    tokenizer = load_data_tokenizer(data_folder)
    held_out = [text for text in make_documents() if split_of(text, 0.2) == "held_out"]
    known = ngram_statistics(held_out[:3], tokenizer, data_folder)
    assert known["held_out_4grams"] > 0.98  # all but those that cross the end of a sequence
    assert ngram_statistics(["zqzqzqzqzqzqzq"], tokenizer, data_folder)["held_out_4grams"] == 0.0
    assert ngram_statistics(["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"], tokenizer, data_folder)["distinct_2"] < 0.2
