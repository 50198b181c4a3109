"""Intervals say what they claim to: bootstrap coverage over documents, pairing, and sums by document."""

import math

import numpy as np

from dlm_ray.diffusion.likelihood import bits_per_byte, by_document, documents_interval, draws_interval


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


def test_sums_by_document_leave_padding_out():
    values = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    documents = np.array([[0, 0, 1], [1, 2, -1]])
    assert by_document(values, documents).tolist() == [3.0, 12.0, 16.0]
