"""What a model of held-out text has to beat: unigram frequencies and a general-purpose compressor."""

from __future__ import annotations

import lzma

import numpy as np

from dlm_ray.data.index import load_data_tokenizer, load_index
from dlm_ray.data.reading import read_split
from dlm_ray.diffusion import likelihood
from dlm_ray.diffusion.draws import maskable_positions
from dlm_ray.generation.scoring import Scored, number_documents


def unigram_score(data: str, max_sequences: int | None = None) -> Scored:
    """The held-out documents under the training split's token frequencies (plus one each): what knows no order at all."""
    counts = np.ones(load_index(data).tokenizer.vocab_size)
    for row in read_split(data, "train"):
        scored = maskable_positions(row.document_ids[None])[0]
        counts += np.bincount(row.input_ids[scored], minlength=len(counts))
    nats = -np.log(counts / counts.sum())
    rows = read_split(data, "held_out", max_sequences)
    document_ids = np.stack([row.document_ids for row in rows])
    scored = maskable_positions(document_ids)
    documents = number_documents([row.part for row in rows], document_ids)
    by_document = likelihood.by_document(
        np.where(scored, nats[np.stack([row.input_ids for row in rows])], 0.0), documents
    )
    num_bytes = likelihood.by_document(np.stack([row.num_bytes for row in rows]).astype(np.float64), documents)
    return Scored(by_document, num_bytes, by_document.sum(keepdims=True), int(scored.sum()), is_bound=False)


def xz_bits_per_byte(data: str, max_sequences: int | None = None) -> float:
    """`xz -9` of the held-out text, in bits per byte."""
    tokenizer = load_data_tokenizer(data)
    tokens = [
        row.input_ids[maskable_positions(row.document_ids[None])[0]]
        for row in read_split(data, "held_out", max_sequences)
    ]
    text = tokenizer.decode(np.concatenate(tokens).tolist(), skip_special_tokens=True).encode()
    return 8 * len(lzma.compress(text, preset=9)) / len(text)
