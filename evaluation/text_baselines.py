"""Baselines for bits per byte of held-out text: unigram frequencies and a general-purpose compressor."""

from __future__ import annotations

import lzma

import numpy as np
from dlm_ray.evaluation.trained import stack

from dlm_ray.data.index import load_data_tokenizer, load_index
from dlm_ray.data.reading import DataSequence, read_split
from dlm_ray.diffusion import likelihood
from dlm_ray.diffusion.draws import maskable_positions
from dlm_ray.generation.scoring import Scored, number_documents


def unigram_score(data: str, max_sequences: int | None = None) -> Scored:
    """Score held-out documents with the token frequencies of the training split.

    Args:
        data: a data folder.
        max_sequences: score at most this many held-out sequences, evenly spaced; all if None.

    Returns:
        Exact nats per document. Every token's count is increased by one, so that none has probability 0.
    """
    counts = np.ones(load_index(data).tokenizer.vocab_size)
    for sequence in read_split(data, "train"):
        counts += np.bincount(text_tokens(sequence), minlength=len(counts))
    nats_of_token = -np.log(counts / counts.sum())
    sequences = read_split(data, "held_out", max_sequences)
    x_0, document_ids = stack(sequences)
    is_scored = maskable_positions(document_ids)
    documents = number_documents([sequence.chunk for sequence in sequences], document_ids)
    num_bytes = np.stack([sequence.num_bytes for sequence in sequences]).astype(np.float64)
    nats = likelihood.by_document(np.where(is_scored, nats_of_token[x_0], 0.0), documents)
    bytes_by_document = likelihood.by_document(num_bytes, documents)
    return Scored(nats, bytes_by_document, nats.sum(keepdims=True), int(is_scored.sum()), is_bound=False)


def xz_bits_per_byte(data: str, max_sequences: int | None = None) -> float:
    """Return the size of the held-out text compressed by `xz -9`, in bits per byte.

    Args:
        data: a data folder.
        max_sequences: compress at most this many held-out sequences, evenly spaced; all if None.
    """
    tokenizer = load_data_tokenizer(data)
    tokens = [text_tokens(sequence) for sequence in read_split(data, "held_out", max_sequences)]
    text = tokenizer.decode(np.concatenate(tokens).tolist(), skip_special_tokens=True).encode()
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def text_tokens(sequence: DataSequence) -> np.ndarray:
    """Return the token ids of a packed sequence without start tokens and padding."""
    return sequence.input_ids[maskable_positions(sequence.document_ids[None])[0]]
