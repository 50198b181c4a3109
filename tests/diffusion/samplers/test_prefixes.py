"""What is kept of prompts: found only behind the same tokens, never more than there is room for, and the least recently used goes first."""

import numpy as np
import torch

from dlm_ray.diffusion.samplers.prefixes import Prefixes

PIECE_BYTES = 4 * 4  # one row of keys and the last row, of 2 float32 each


def keep(prefixes, text):
    """Pieces that say what they were made of: the sum of all tokens up to their end."""

    def make(start):
        whole = float(sum(map(ord, text[: start + prefixes.piece_tokens])))
        return torch.tensor([start, whole]), torch.tensor([start, whole])

    prefixes.keep([ord(letter) for letter in text], make)


def found(prefixes, text):
    pieces = prefixes.find([ord(letter) for letter in text])
    assert [piece.pairs.tolist() for piece in pieces] == [
        [2.0 * number, float(sum(map(ord, text[: 2 * number + 2])))] for number in range(len(pieces))
    ]
    return 2 * len(pieces)


def test_a_beginning_is_found_as_far_as_it_is_the_same_in_whole_pieces():
    prefixes = Prefixes(2, 100 * PIECE_BYTES)
    keep(prefixes, "aabbccd")
    assert [found(prefixes, text) for text in ("aabbcc", "aabbccdd", "aabb", "aab", "aaccbb", "bbcc", "a", "")] == [
        6,
        6,
        4,
        2,
        2,
        0,
        0,
        0,
    ]
    keep(prefixes, "bbcc")  # the same tokens behind others are another piece
    assert found(prefixes, "bbccaa") == 4 and len(prefixes) == 5


def test_what_goes_first_was_not_used_for_longest_and_nothing_is_behind_it():
    prefixes = Prefixes(2, 4 * PIECE_BYTES)
    keep(prefixes, "aabb")
    keep(prefixes, "aacc")
    assert found(prefixes, "aabb") == 4
    keep(prefixes, "ddee")
    assert [found(prefixes, text) for text in ("aabb", "aacc", "ddee")] == [4, 2, 4]
    assert prefixes.num_bytes == 4 * PIECE_BYTES


def test_against_a_list_of_all_uses_there_is_never_a_lie_and_never_too_much():
    random = np.random.default_rng(1)
    prefixes = Prefixes(2, 7 * PIECE_BYTES)
    for _ in range(2000):
        text = "".join(random.choice(list("abc"), random.integers(0, 12)))
        before = found(prefixes, text)
        keep(prefixes, text)
        assert found(prefixes, text) >= before  # making room never takes from the text that it is for
        assert prefixes.num_bytes == len(prefixes) * PIECE_BYTES <= prefixes.capacity_bytes
        reached = {0} | {piece.number for piece in prefixes._pieces.values()}
        assert all(parent in reached for parent, _ in prefixes._pieces)  # what cannot be found does not stay


def test_without_room_nothing_is_kept():
    prefixes = Prefixes(2, PIECE_BYTES - 1)
    keep(prefixes, "aabb")
    assert len(prefixes) == 0 and found(prefixes, "aabb") == 0
