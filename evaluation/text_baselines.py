"""What a model of held-out text has to beat: unigram frequencies and a general-purpose compressor."""

from __future__ import annotations

import lzma
import math

import numpy as np

from dlm_ray.data.index import load_data_tokenizer, load_index
from dlm_ray.data.reading import read_split
from dlm_ray.diffusion.draws import maskable_positions


def unigram_bits_per_byte(data: str, max_rows: int | None = None) -> float:
    """Cross-entropy of the held-out tokens under the training split's token frequencies (plus one each), in bits per byte."""
    counts = np.ones(load_index(data).tokenizer.vocab_size)
    for row in read_split(data, "train"):
        scored = maskable_positions(row.document_ids[None])[0]
        counts += np.bincount(row.input_ids[scored], minlength=len(counts))
    nats = -np.log(counts / counts.sum())
    total, num_bytes = 0.0, 0
    for row in read_split(data, "held_out", max_rows):
        scored = maskable_positions(row.document_ids[None])[0]
        total += nats[row.input_ids[scored]].sum()
        num_bytes += int(row.num_bytes.sum())
    return float(total / math.log(2) / num_bytes)


def xz_bits_per_byte(data: str, max_rows: int | None = None) -> float:
    """`xz -9` of the held-out text, in bits per byte."""
    tokenizer = load_data_tokenizer(data)
    tokens = [row.input_ids[maskable_positions(row.document_ids[None])[0]] for row in read_split(data, "held_out", max_rows)]
    text = tokenizer.decode(np.concatenate(tokens).tolist(), skip_special_tokens=True).encode()
    return 8 * len(lzma.compress(text, preset=9)) / len(text)
