"""The prefix cache finds pieces only after the same tokens, respects its capacity, and evicts the oldest first."""

import numpy as np
import torch

from dlm_ray.diffusion.samplers.prefixes import Prefixes

PIECE_BYTES = 4 * 4  # one row of keys and the last row, of 2 float32 each


def keep(prefixes, text):
    """Add pieces whose content is the sum of all tokens up to their end."""

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


def test_find_returns_the_whole_pieces_of_the_common_prefix():
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
    keep(prefixes, "bbcc")  # the same tokens after other tokens are a different piece
    assert found(prefixes, "bbccaa") == 4 and len(prefixes) == 5


def test_the_least_recently_used_piece_without_successors_is_evicted_first():
    prefixes = Prefixes(2, 4 * PIECE_BYTES)
    keep(prefixes, "aabb")
    keep(prefixes, "aacc")
    assert found(prefixes, "aabb") == 4
    keep(prefixes, "ddee")
    assert [found(prefixes, text) for text in ("aabb", "aacc", "ddee")] == [4, 2, 4]
    assert prefixes.num_bytes == 4 * PIECE_BYTES


def test_results_agree_with_a_list_of_all_uses_and_memory_stays_within_capacity():
    random = np.random.default_rng(1)
    prefixes = Prefixes(2, 7 * PIECE_BYTES)
    for _ in range(2000):
        text = "".join(random.choice(list("abc"), random.integers(0, 12)))
        before = found(prefixes, text)
        keep(prefixes, text)
        assert found(prefixes, text) >= before  # eviction never removes pieces of the text that is added
        assert prefixes.num_bytes == len(prefixes) * PIECE_BYTES <= prefixes.capacity_bytes
        reached = {0} | {piece.number for piece in prefixes._pieces.values()}
        assert all(parent in reached for parent, _ in prefixes._pieces)  # pieces that cannot be found are evicted


def test_a_cache_without_capacity_keeps_no_pieces():
    prefixes = Prefixes(2, PIECE_BYTES - 1)
    keep(prefixes, "aabb")
    assert len(prefixes) == 0 and found(prefixes, "aabb") == 0
