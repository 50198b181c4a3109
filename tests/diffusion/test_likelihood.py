"""Intervals say what they claim to: bootstrap coverage over documents, pairing, and sums by document."""

import math

import numpy as np
import pytest

from dlm_ray.diffusion.likelihood import bits_per_byte, by_document, documents_interval, draws_interval
from dlm_ray.generation.scoring import Scored


def test_bits_per_byte_of_a_fair_coin_a_byte():
    assert bits_per_byte(80 * math.log(2), 80) == 1.0


def test_the_documents_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(120):
        num_bytes = random.integers(50, 500, size=60).astype(float)
        nats = num_bytes * random.normal(1.5, 0.3, size=60)  # true bits per byte: 1.5 / ln 2
        low, high = documents_interval(nats, num_bytes, seed=trial)
        covered += low < 1.5 / math.log(2) < high
    assert 0.88 <= covered / 120 <= 1.0


def test_pairing_removes_what_two_models_share():
    random = np.random.default_rng(1)
    num_bytes = np.full(40, 100.0)
    hard = random.normal(150, 40, size=40)
    better, worse = hard, hard + random.normal(3, 1, size=40)
    low, high = documents_interval(worse - better, num_bytes)
    assert 0 < low < high
    alone = documents_interval(worse, num_bytes)
    assert high - low < (alone[1] - alone[0]) / 10


def test_one_draw_has_no_interval_over_draws():
    assert draws_interval(np.array([3.0]), 10) is None
    low, high = draws_interval(np.array([3.0, 5.0, 4.0, 4.0]), 10)
    assert low < bits_per_byte(4.0, 10) < high


@pytest.mark.parametrize(
    "num_bytes", [[80.0], [80.0, 0.0], [0.0, 80.0, 0.0]], ids=["one", "one and an empty one", "one and two empty ones"]
)
def test_one_document_with_text_has_no_interval_over_documents(num_bytes):
    """Every resample of it is itself: an interval of zero width would be told apart from anything."""
    nats = np.where(np.array(num_bytes) > 0, 50.0, 3.0)  # an empty document costs its end token
    assert documents_interval(nats, np.array(num_bytes)) is None
    scored, other = (
        Scored(scale * nats, np.array(num_bytes), np.array([1.0]), 10, is_bound=False) for scale in (1.0, 1.1)
    )
    assert scored.as_dict()["ci95_documents"] is None and scored.minus(other)["ci95_documents_paired"] is None


def test_a_resample_without_text_has_no_bits_per_byte():
    """An empty document costs its end token, and three nats over no bytes are not three nats over one."""
    nats, num_bytes = np.array([50.0, 60.0, 3.0]), np.array([80.0, 80.0, 0.0])
    low, high = documents_interval(nats, num_bytes)
    least, most = bits_per_byte(50.0, 80.0), bits_per_byte(60.0 + 2 * 3.0, 80.0)
    assert least <= low < high <= most


def test_sums_by_document_leave_padding_out():
    values = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    documents = np.array([[0, 0, 1], [1, 2, -1]])
    assert by_document(values, documents).tolist() == [3.0, 12.0, 16.0]
