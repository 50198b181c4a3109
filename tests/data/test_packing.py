"""Packing loses nothing: the segments of a document, put together, are its tokens."""

from collections import defaultdict

import numpy as np
import pytest

from dlm_ray.data.packing import Packer
from dlm_ray.diffusion.draws import maskable_positions

START, END = 1000, 1001


def pack(documents, sequence_length):
    packer = Packer(sequence_length, START, END)
    return [row for document in documents for row in packer.add(*document)] + packer.finish()


def documents(lengths):
    return [
        (number, list(range(number * 100, number * 100 + length)), [1] * length)
        for number, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("sequence_length", [3, 4, 7, 64])
def test_every_token_stands_once_and_in_order(sequence_length):
    given = documents([1, 2, 30, 5, 90, 6, 1])
    rows = pack(given, sequence_length)
    found, num_bytes = defaultdict(list), defaultdict(int)
    for row in rows:
        assert len(row.input_ids) == len(row.document_ids) == len(row.num_bytes) == sequence_length
        assert row.input_ids[0] == START
        scored = maskable_positions(row.document_ids[None])[0]
        for token, document, size in zip(
            row.input_ids[scored], row.document_ids[scored], row.num_bytes[scored], strict=True
        ):
            found[int(document)].append(int(token))
            num_bytes[int(document)] += int(size)
        starts = ~scored & (row.document_ids >= 0)
        assert (row.input_ids[starts] == START).all() and (row.num_bytes[starts] == 0).all()
    for number, tokens, sizes in given:
        assert found[number] == [*tokens, END]
        assert num_bytes[number] == sum(sizes)


def test_padding_is_marked_and_scores_nothing():
    [row] = pack(documents([2]), 8)
    assert row.document_ids.tolist() == [0, 0, 0, 0, -1, -1, -1, -1]
    assert not maskable_positions(row.document_ids[None])[0][4:].any()


def test_no_segment_is_a_start_token_alone():
    for row in pack(documents([3, 3, 3, 3, 3]), 6):
        ids = row.document_ids
        for document in np.unique(ids[ids >= 0]):
            assert (ids == document).sum() >= 2


def test_a_row_is_given_as_soon_as_the_next_token_does_not_fit():
    packer = Packer(4, START, END)
    assert packer.add(0, [1, 2], [1, 1]) == []  # start, 1, 2, end: full, and nothing follows yet
    [row] = packer.add(1, [3], [1])
    assert row.input_ids.tolist() == [START, 1, 2, END]
    [row] = packer.finish()
    assert row.input_ids.tolist() == [START, 3, END, END] and row.document_ids.tolist() == [1, 1, 1, -1]
    assert packer.finish() == []
