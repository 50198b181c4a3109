"""Every rule against the exact distribution of a 3-token toy model, and the tokens that it must not change."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.laws import (
    FULL,
    chi_square_z,
    empty_canvas,
    exact_ancestral,
    exact_by_states,
    independent_positions,
    tally,
)
from helpers.toy import LENGTH, MASK, VOCAB, TableDenoiser

from dlm_ray.diffusion.samplers.adjust import banned
from dlm_ray.diffusion.samplers.rules import Ancestral, Confidence, LeftToRight, StateDependent, Tweedie
from dlm_ray.diffusion.samplers.token_sampling import sample_tokens
from dlm_ray.diffusion.samplers.whole_canvas import grid_times, sample
from dlm_ray.diffusion.schedules import Cosine, Polynomial


@pytest.mark.parametrize(("schedule", "num_steps"), [(Polynomial(), 1), (Polynomial(), 3), (Cosine(), 4)], ids=str)
def test_ancestral_sampling_has_the_exact_distribution(schedule, num_steps):
    denoiser, num_samples = TableDenoiser(1), 20_000
    done = sample(denoiser, empty_canvas(num_samples), Ancestral(schedule), FULL, num_steps=num_steps, seed=2)
    exact = exact_ancestral(denoiser, schedule, num_steps)
    assert sum(exact.values()) == pytest.approx(1)
    assert abs(chi_square_z(tally(done.ids), exact, num_samples)) < 4


def test_left_to_right_samples_the_product_of_conditionals():
    denoiser, num_samples = TableDenoiser(1), 20_000
    done = sample(denoiser, empty_canvas(num_samples), LeftToRight(), FULL, num_steps=LENGTH, seed=3)
    exact = {}
    for words in itertools.product(range(VOCAB), repeat=LENGTH):
        x_t, log_p = [0, MASK, MASK, MASK], 0.0
        for n, word in enumerate(words, start=1):
            log_p += denoiser.log_probs(torch.tensor(x_t))[n, word].item()
            x_t[n] = word
        exact[(0, *words)] = math.exp(log_p)
    assert abs(chi_square_z(tally(done.ids), exact, num_samples)) < 4
    assert done.num_network_calls == LENGTH


def test_confidence_at_temperature_0_reveals_the_most_certain_position_first():
    denoiser = TableDenoiser(5)
    canvas = empty_canvas(1)
    done = sample(denoiser, canvas, Confidence(Polynomial()), FULL, num_steps=LENGTH, temperature=0)
    x_t = [0, MASK, MASK, MASK]
    for _ in range(LENGTH):
        log_probs = denoiser.log_probs(torch.tensor(x_t))
        masked = [n for n in range(1, 1 + LENGTH) if x_t[n] == MASK]
        best = max(masked, key=lambda n: log_probs[n].max().item())
        x_t[best] = log_probs[best].argmax().item()
    assert done.ids[0].tolist() == x_t


@pytest.mark.parametrize("num_steps", [1, 2, 5, 64])
def test_confidence_follows_the_schedule_without_unneeded_network_calls(num_steps):
    canvas = empty_canvas(6)
    left = []
    rule = Confidence(Polynomial())
    done = sample(
        TableDenoiser(),
        canvas,
        rule,
        FULL,
        num_steps=num_steps,
        on_step=lambda step, steps, now: left.append((step, now.is_masked.sum(1).tolist())),
    )
    for step, counts in left:
        assert counts == [math.floor(LENGTH * (1 - step / num_steps) + 1e-9)] * 6
    assert done.num_network_calls == min(num_steps, LENGTH)


def test_given_tokens_do_not_change():
    canvas = empty_canvas(50)
    canvas.ids[:, 2], canvas.is_masked[:, 2] = 3, False
    for rule in (Ancestral(Polynomial()), Confidence(Polynomial()), LeftToRight()):
        done = sample(TableDenoiser(), canvas, rule, FULL, num_steps=4)
        assert (done.ids[:, 2] == 3).all() and (done.ids[:, 0] == 0).all()


def test_a_row_does_not_depend_on_other_rows():
    alone = sample(TableDenoiser(), empty_canvas(1), Ancestral(Polynomial()), FULL, num_steps=5, seed=9)
    company = sample(TableDenoiser(), empty_canvas(31), Ancestral(Polynomial()), FULL, num_steps=5, seed=9)
    assert torch.equal(company.ids[0], alone.ids[0])


def test_tokens_including_rare_ones_are_sampled_with_their_probabilities():
    probabilities = torch.tensor([0.5, 0.3, 0.2 - 2e-4, 2e-4], dtype=torch.float64)
    num_samples = 200_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(num_samples))
    tokens, log_probs = sample_tokens(probabilities.log().repeat(num_samples, 1), uniform, 1.0, 1.0)
    counts = {word: int((tokens == word).sum()) for word in range(4)}
    assert abs(chi_square_z(counts, dict(enumerate(probabilities.tolist())), num_samples)) < 4
    assert torch.allclose(log_probs.exp(), probabilities[tokens])


def test_top_p_keeps_the_smallest_set_of_that_probability():
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64)
    uniform = torch.linspace(0, 1 - 1e-9, 1000, dtype=torch.float64)
    for top_p, kept in [(0.4, {1}), (0.5, {1}), (0.51, {1, 3}), (0.76, {1, 2, 3}), (1.0, {0, 1, 2, 3})]:
        tokens, _ = sample_tokens(probabilities.log().repeat(1000, 1), uniform, 1.0, top_p)
        assert set(tokens.tolist()) == kept, top_p


def test_temperature_0_samples_the_most_probable_token_that_is_not_banned():
    logits = torch.tensor([[1.0, 3.0, 2.0]]).repeat(100, 1)
    uniform = torch.linspace(0, 0.999, 100, dtype=torch.float64)
    assert set(sample_tokens(logits, uniform, 0.0, 1.0)[0].tolist()) == {1}
    without = banned([1])(logits, uniform, uniform)
    assert set(sample_tokens(without, uniform, 0.0, 1.0)[0].tolist()) == {2}
    assert set(sample_tokens(without, uniform, 1.0, 1.0)[0].tolist()) == {0, 2}


def test_a_cosine_grid_on_the_linear_schedule_is_a_uniform_grid_on_the_cosine_schedule():
    """The same times in terms of alpha, therefore the same coins and the same texts."""
    canvas = empty_canvas(500)
    one = sample(TableDenoiser(1), canvas, Ancestral(Polynomial()), FULL, num_steps=7, grid="cosine", seed=4)
    other = sample(TableDenoiser(1), canvas, Ancestral(Cosine()), FULL, num_steps=7, grid="uniform", seed=4)
    assert torch.equal(one.ids, other.ids)
    assert grid_times("cosine", 4) == pytest.approx(
        [math.cos(math.pi / 2 * (1 - i / 4)) for i in (4, 3, 2, 1, 0)], abs=1e-12
    )


@pytest.mark.parametrize("noise", ["float64", "float32_gumbel"])
def test_joint_sampling_has_the_distribution_of_coin_and_token(noise):
    denoiser, num_samples = TableDenoiser(1), 20_000
    done = sample(
        denoiser, empty_canvas(num_samples), Ancestral(Polynomial(), joint=True), FULL, num_steps=3, noise=noise, seed=2
    )
    assert abs(chi_square_z(tally(done.ids), exact_ancestral(denoiser, Polynomial(), 3), num_samples)) < 4


@pytest.mark.parametrize("grid", ["uniform", "cosine"])
def test_the_state_dependent_step_has_the_exact_distribution_of_genmd4(grid):
    denoiser, num_samples, num_steps = TableDenoiser(1), 20_000, 3
    exponents = torch.tensor([0.4, 1.0, 2.5, 1.3], dtype=torch.float64)
    times = grid_times(grid, num_steps)

    def step_of(x_t, step):
        mu = denoiser.log_probs(torch.tensor(x_t)).exp()
        return independent_positions(x_t, (1 - (times[step + 1] / times[step]) ** exponents) * mu)

    exact = exact_by_states(num_steps, step_of)
    assert sum(exact.values()) == pytest.approx(1)
    done = sample(
        denoiser, empty_canvas(num_samples), StateDependent(exponents), FULL, num_steps=num_steps, grid=grid, seed=5
    )
    assert abs(chi_square_z(tally(done.ids), exact, num_samples)) < 4


def test_the_state_dependent_step_with_exponents_of_1_is_the_ancestral_step():
    one = sample(TableDenoiser(1), empty_canvas(300), StateDependent(torch.ones(VOCAB)), FULL, num_steps=4, seed=6)
    other = sample(TableDenoiser(1), empty_canvas(300), Ancestral(Polynomial(), joint=True), FULL, num_steps=4, seed=6)
    assert torch.equal(one.ids, other.ids)


@pytest.mark.parametrize("shift", [0.0, 0.9, -0.5])
def test_the_tweedie_step_has_the_exact_distribution_with_and_without_clamping(shift):
    """SEDD's formula s_v (e^D - 1); a sum above 1 is normalised, and the last step drops the mask."""

    class Unnormalised(TableDenoiser):
        def hidden(self, input_ids, visibility):
            return super().hidden(input_ids, visibility) + shift

    denoiser, num_samples, num_steps, schedule = Unnormalised(1), 20_000, 4, Polynomial()
    clamped = []

    def step_of(x_t, step):
        t, s = (torch.tensor(1 - (step + k) / num_steps, dtype=torch.float64) for k in (0, 1))
        logits = denoiser.hidden(torch.tensor(x_t)[None], None)[0]
        if step == num_steps - 1:
            return independent_positions(x_t, logits.softmax(-1))
        # s_v (e^D - 1) with s_v = r exp(f_v) / V, r = alpha_t / (1 - alpha_t), e^D = alpha_s / alpha_t
        becomes = (schedule.alpha(s) - schedule.alpha(t)) / schedule.mask_probability(t) * logits.exp() / VOCAB
        total = becomes.sum(-1, keepdim=True)
        clamped.extend((total > 1).flatten().tolist())
        return independent_positions(x_t, torch.where(total > 1, becomes / total, becomes))

    exact = exact_by_states(num_steps, step_of)
    done = sample(denoiser, empty_canvas(num_samples), Tweedie(schedule, VOCAB), FULL, num_steps=num_steps, seed=8)
    assert abs(chi_square_z(tally(done.ids), exact, num_samples)) < 4
    assert any(clamped)


def test_the_tweedie_step_with_a_normalised_score_is_the_ancestral_step():
    class Normalised(TableDenoiser):
        def reduce_logits(self, rows, fn, *arguments):
            return fn(rows.log_softmax(-1) + math.log(VOCAB), *arguments)

    one = sample(Normalised(1), empty_canvas(300), Tweedie(Polynomial(), VOCAB), FULL, num_steps=4, seed=6)
    other = sample(Normalised(1), empty_canvas(300), Ancestral(Polynomial(), joint=True), FULL, num_steps=4, seed=6)
    assert torch.equal(one.ids, other.ids)


def test_float32_gumbel_noise_truncates_the_tail_that_float64_keeps():
    """Inverting the cumulative distribution samples an outcome of probability 1e-9; float32 Gumbel noise cannot."""
    log_p = torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64).log()
    uniform = torch.linspace(0, 0.9e-9, 4, dtype=torch.float64)
    assert (sample_tokens(log_p.repeat(4, 1), uniform, 1.0, 1.0)[0] == 0).all()
    numbers = torch.tensor([np.nextafter(np.float32(1), np.float32(0)), np.finfo(np.float32).tiny, 2**-24])
    highest, lowest, usual_lowest = (-torch.log(-torch.log(numbers))).tolist()
    assert highest - usual_lowest < math.log(1e9) + math.log(2)
    assert lowest > -5
