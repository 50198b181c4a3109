"""Every rule against the exact distribution of a 3-token toy model, and what it must leave alone."""

import itertools
import math

import numpy as np
import pytest
import torch
from toy import LENGTH, MASK, VOCAB, TableDenoiser

from dlm_ray.diffusion.samplers.rules import Ancestral, Canvas, Confidence, LeftToRight
from dlm_ray.diffusion.samplers.whole_canvas import draw_tokens, sample
from dlm_ray.diffusion.schedules import Cosine, Polynomial
from dlm_ray.diffusion.visibility import Visibility

FULL = Visibility("bidirectional")


def empty_canvas(num_rows):
    ids = torch.zeros(num_rows, 1 + LENGTH, dtype=torch.long)
    is_masked = torch.ones(num_rows, 1 + LENGTH, dtype=torch.bool)
    is_masked[:, 0] = False
    return Canvas(ids, is_masked)


def transition(denoiser, x_t, reveal_probability):
    """Exact distribution over next states of one ancestral step from x_t."""
    log_probs = denoiser.log_probs(torch.tensor(x_t))
    masked = [n for n in range(1, 1 + LENGTH) if x_t[n] == MASK]
    for revealed in itertools.product([False, True], repeat=len(masked)):
        chosen = [n for n, is_revealed in zip(masked, revealed, strict=True) if is_revealed]
        p_positions = math.prod(reveal_probability if r else 1 - reveal_probability for r in revealed)
        for words in itertools.product(range(VOCAB), repeat=len(chosen)):
            state = list(x_t)
            for n, word in zip(chosen, words, strict=True):
                state[n] = word
            yield tuple(state), p_positions * math.exp(sum(log_probs[n, w].item() for n, w in zip(chosen, words, strict=True)))


def exact_ancestral(denoiser, schedule, num_steps):
    """The law of the finished text, by dynamic programming over all partly masked states."""
    states = {(0, MASK, MASK, MASK): 1.0}
    for step in range(num_steps):
        t, s = (torch.tensor(1 - (step + k) / num_steps, dtype=torch.float64) for k in (0, 1))
        u = 1 - (schedule.mask_probability(s) / schedule.mask_probability(t)).item()
        following = {}
        for x_t, probability in states.items():
            for state, p in transition(denoiser, x_t, u):
                following[state] = following.get(state, 0.0) + probability * p
        states = following
    return states


def chi_square_z(counts, probabilities, num_samples):
    """Standardised chi-square statistic over cells that expect at least 5."""
    cells = [(counts.get(state, 0), p * num_samples) for state, p in probabilities.items() if p * num_samples >= 5]
    rest = num_samples - sum(n for n, _ in cells), num_samples - sum(e for _, e in cells)
    cells += [rest] if rest[1] >= 5 else []
    statistic = sum((n - e) ** 2 / e for n, e in cells)
    return (statistic - (len(cells) - 1)) / math.sqrt(2 * (len(cells) - 1))


def tally(ids):
    states, counts = np.unique(ids.numpy(), axis=0, return_counts=True)
    return {tuple(int(word) for word in state): int(n) for state, n in zip(states, counts, strict=True)}


@pytest.mark.parametrize(("schedule", "num_steps"), [(Polynomial(), 1), (Polynomial(), 3), (Cosine(), 4)], ids=str)
def test_ancestral_sampling_has_the_exact_law(schedule, num_steps):
    denoiser, num_samples = TableDenoiser(1), 20_000
    done = sample(denoiser, empty_canvas(num_samples), Ancestral(schedule), FULL, num_steps=num_steps, seed=2)
    exact = exact_ancestral(denoiser, schedule, num_steps)
    assert sum(exact.values()) == pytest.approx(1)
    assert abs(chi_square_z(tally(done.ids), exact, num_samples)) < 4


def test_left_to_right_has_the_law_of_the_product_of_conditionals():
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
    done = sample(denoiser, canvas, Confidence(Polynomial(), canvas.is_masked.sum(1)), FULL, num_steps=LENGTH, temperature=0)
    x_t = [0, MASK, MASK, MASK]
    for _ in range(LENGTH):
        log_probs = denoiser.log_probs(torch.tensor(x_t))
        masked = [n for n in range(1, 1 + LENGTH) if x_t[n] == MASK]
        best = max(masked, key=lambda n: log_probs[n].max().item())
        x_t[best] = log_probs[best].argmax().item()
    assert done.ids[0].tolist() == x_t


@pytest.mark.parametrize("num_steps", [1, 2, 5, 64])
def test_confidence_follows_the_schedule_and_never_calls_the_network_for_nothing(num_steps):
    canvas = empty_canvas(6)
    left = []
    rule = Confidence(Polynomial(), canvas.is_masked.sum(1))
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


def test_given_tokens_are_never_touched():
    canvas = empty_canvas(50)
    canvas.ids[:, 2], canvas.is_masked[:, 2] = 3, False
    for rule in (Ancestral(Polynomial()), Confidence(Polynomial(), canvas.is_masked.sum(1)), LeftToRight()):
        done = sample(TableDenoiser(), canvas, rule, FULL, num_steps=4)
        assert (done.ids[:, 2] == 3).all() and (done.ids[:, 0] == 0).all()


def test_a_row_is_the_same_alone_and_in_company():
    alone = sample(TableDenoiser(), empty_canvas(1), Ancestral(Polynomial()), FULL, num_steps=5, seed=9)
    company = sample(TableDenoiser(), empty_canvas(31), Ancestral(Polynomial()), FULL, num_steps=5, seed=9)
    assert torch.equal(company.ids[0], alone.ids[0])


def test_tokens_are_drawn_with_their_probabilities_even_rare_ones():
    probabilities = torch.tensor([0.5, 0.3, 0.2 - 2e-4, 2e-4], dtype=torch.float64)
    num_samples = 200_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(num_samples))
    tokens, log_probs = draw_tokens(probabilities.log().repeat(num_samples, 1), uniform, 1.0, 1.0, None)
    counts = {word: int((tokens == word).sum()) for word in range(4)}
    assert abs(chi_square_z(counts, dict(enumerate(probabilities.tolist())), num_samples)) < 4
    assert torch.allclose(log_probs.exp(), probabilities[tokens])


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64)
    uniform = torch.linspace(0, 1 - 1e-9, 1000, dtype=torch.float64)
    for top_p, kept in [(0.4, {1}), (0.5, {1}), (0.51, {1, 3}), (0.76, {1, 2, 3}), (1.0, {0, 1, 2, 3})]:
        tokens, _ = draw_tokens(probabilities.log().repeat(1000, 1), uniform, 1.0, top_p, None)
        assert set(tokens.tolist()) == kept, top_p


def test_temperature_0_takes_the_best_and_banned_tokens_never_come():
    logits = torch.tensor([[1.0, 3.0, 2.0]]).repeat(100, 1)
    uniform = torch.linspace(0, 0.999, 100, dtype=torch.float64)
    assert set(draw_tokens(logits, uniform, 0.0, 1.0, None)[0].tolist()) == {1}
    assert set(draw_tokens(logits, uniform, 0.0, 1.0, torch.tensor([1]))[0].tolist()) == {2}
    assert set(draw_tokens(logits, uniform, 1.0, 1.0, torch.tensor([1]))[0].tolist()) == {0, 2}
