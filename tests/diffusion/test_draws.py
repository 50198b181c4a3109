"""Draws depend on (seed, step, global row) alone, are stratified over the global batch, and score what they mask."""

import numpy as np
import pytest
import torch

from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.draws import ROW_MULTIPLE, DrawKey, evaluation_times, maskable_positions, times
from dlm_ray.diffusion.objectives import Masked
from dlm_ray.diffusion.schedules import Cosine, Polynomial

ROWS, LENGTH = 12, 40


def draw(rows, step=3, seed=5, schedule=None):
    maskable = np.ones((len(rows), LENGTH), dtype=bool)
    maskable[:, 0] = False
    return Masked(Absorbing(schedule or Polynomial())).draw(DrawKey(seed, step, rows, ROWS), None, maskable)


def test_masks_do_not_depend_on_how_the_global_batch_is_cut():
    whole = draw(range(ROWS))
    for cut in ([range(0, 6), range(6, 12)], [range(0, 1), range(1, 8), range(8, 12)]):
        parts = [draw(rows) for rows in cut]
        assert torch.equal(torch.cat([part.is_masked for part in parts]), whole.is_masked)
        assert torch.equal(torch.cat([part.t for part in parts]), whole.t)
        assert sum(part.num_scored for part in parts) == whole.num_scored


@pytest.mark.parametrize("other", [{"seed": 6}, {"step": 4}])
def test_another_seed_or_step_gives_other_masks(other):
    assert not torch.equal(draw(range(ROWS), **other).is_masked, draw(range(ROWS)).is_masked)


def test_every_stratum_of_t_is_hit_once_a_step():
    t = times("stratified", DrawKey(0, 7, range(ROWS), ROWS))[:, 0]
    assert sorted(np.floor(t * ROWS)) == list(range(ROWS))


def test_no_place_in_the_batch_has_a_biased_t():
    t = np.array([times("stratified", DrawKey(0, step, range(ROWS), ROWS))[:, 0] for step in range(600)])
    standard_error = np.sqrt(1 / 12 / 600)
    assert (np.abs(t.mean(0) - 0.5) < 4.5 * standard_error).all()


def test_strata_estimate_the_integral_of_t_better_than_independent_draws():
    means = [times("stratified", DrawKey(0, step, range(ROWS), ROWS)).mean() for step in range(200)]
    independent = np.random.default_rng(0).random((200, ROWS)).mean(1)
    assert np.var(means) < np.var(independent) / 20


def test_evaluation_times_have_strata_of_their_own_for_every_row():
    t = evaluation_times(0, [4, 9], 8)
    assert (np.sort(np.floor(t * 8)) == np.arange(8)).all()
    assert (evaluation_times(0, [9], 8) == t[1:]).all()


@pytest.mark.parametrize("schedule", [Polynomial(), Polynomial(3.0), Cosine()], ids=str)
def test_share_of_masked_tokens_is_the_mask_probability(schedule):
    shares, expected = [], []
    for step in range(150):
        one = draw(range(ROWS), step=step, schedule=schedule)
        shares.append(one.is_masked[:, 1:].double().mean().item())
        expected.append(schedule.mask_probability(one.t.double()).mean().item())
    standard_error = np.sqrt(0.25 / (150 * ROWS * (LENGTH - 1)))
    assert abs(np.mean(shares) - np.mean(expected)) < 4.5 * standard_error


def test_scored_positions_are_the_masked_ones_and_padding_weighs_nothing():
    one = draw(range(ROWS))
    real = one.scored[: one.num_scored]
    assert len(one.scored) % ROW_MULTIPLE == 0
    assert torch.equal(real, one.is_masked.flatten().nonzero()[:, 0])
    assert (one.weight[one.num_scored :] == 0).all()
    assert torch.allclose(one.weight[: one.num_scored], 1 / one.t[real // LENGTH])
    assert one.num_maskable == ROWS * (LENGTH - 1)


def test_start_tokens_and_padding_are_never_maskable():
    document_ids = np.array([[4, 4, 4, 5, 5, -1], [5, 5, 5, 5, 5, 5]])
    assert maskable_positions(document_ids).tolist() == [
        [False, True, True, False, True, False],
        [False, True, True, True, True, True],
    ]
