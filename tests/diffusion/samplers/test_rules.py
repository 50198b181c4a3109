"""Tests of the rules: selections computed by hand, distributions by exact enumeration on canvases and blocks."""

import itertools
import math
from types import SimpleNamespace

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

from dlm_ray.diffusion.draws import SAMPLING, generator
from dlm_ray.diffusion.samplers.adjust import banned, chained, forced, pattern
from dlm_ray.diffusion.samplers.generate import generate_blocks
from dlm_ray.diffusion.samplers.requests import Request
from dlm_ray.diffusion.samplers.rules import (
    Ancestral,
    Canvas,
    Confidence,
    EntropyBounded,
    Factor,
    FirstHitting,
    Threshold,
    Tweedie,
)
from dlm_ray.diffusion.samplers.token_sampling import probabilities, sample_or_stay, sample_tokens
from dlm_ray.diffusion.samplers.whole_canvas import sample
from dlm_ray.diffusion.schedules import Cosine, Polynomial

NOW, THEN = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)


class OneBlock(TableDenoiser):
    """The toy model for the block sampler: a sequence is one block, so its cache stays empty."""

    def hidden(self, ids, visibility, kv=None):
        return super().hidden(ids, visibility)

    def new_cache(self, num_slots, capacity_tokens, *, fixed_shapes=False):
        def nothing(*_):
            return None

        return SimpleNamespace(
            lengths=[0] * num_slots,
            last_rows=torch.zeros(num_slots, VOCAB).double(),
            fork=nothing,
            release=nothing,
            commit=nothing,
        )


def in_a_block(rule, num_samples, num_steps=1, seed=0, **options):
    requests = [Request([0], LENGTH, number, seed) for number in range(num_samples)]
    written = generate_blocks(
        OneBlock(1), requests, rule, block_tokens=1 + LENGTH, context_tokens=8, num_steps=num_steps, **options
    )
    return torch.tensor([[0, *text.ids] for text in written.texts])


def on_the_whole_canvas(rule, num_samples, num_steps=1, seed=0, **options):
    return sample(
        TableDenoiser(1), empty_canvas(num_samples), rule, FULL, num_steps=num_steps, seed=seed, **options
    ).ids


CANVASES = pytest.mark.parametrize("draw", [in_a_block, on_the_whole_canvas])


def in_random_order():
    """Return the distribution of revealing uniformly random masked positions one by one."""
    denoiser = TableDenoiser(1)

    def step_of(x_t, step):
        log_probs = denoiser.log_probs(torch.tensor(x_t))
        masked = [n for n in range(1, 1 + LENGTH) if x_t[n] == MASK]
        for n, word in itertools.product(masked, range(VOCAB)):
            yield (*x_t[:n], word, *x_t[n + 1 :]), math.exp(log_probs[n, word].item()) / len(masked)

    return exact_by_states(LENGTH, step_of)


@CANVASES
def test_first_hitting_has_the_distribution_of_a_random_order(draw):
    exact = in_random_order()
    assert sum(exact.values()) == pytest.approx(1)
    assert abs(chi_square_z(tally(draw(FirstHitting(), 5000, seed=1)), exact, 5000)) < 4


def test_ancestral_sampling_in_a_block_has_the_exact_distribution_and_converges_to_first_hitting():
    few = exact_ancestral(TableDenoiser(1), Cosine(), 3)
    assert abs(chi_square_z(tally(in_a_block(Ancestral(Cosine()), 5000, num_steps=3, seed=2)), few, 5000)) < 4
    assert (
        abs(
            chi_square_z(
                tally(in_a_block(Ancestral(Polynomial()), 5000, num_steps=300, seed=3)), in_random_order(), 5000
            )
        )
        < 4
    )
    # The two laws differ, so that the statistic would have shown a mistake.
    assert (
        abs(
            chi_square_z(
                tally(on_the_whole_canvas(Ancestral(Cosine()), 20_000, num_steps=1, seed=2)), in_random_order(), 20_000
            )
        )
        > 4
    )


@CANVASES
def test_remasking_has_the_exact_distribution_of_remdm(draw):
    """A masked token is revealed with probability (a_s - (1 - sigma) a_t) / (1 - a_t); a revealed one is masked again
    with probability sigma = min(eta, (1 - a_s) / a_t)."""
    eta, num_steps, denoiser = 0.4, 4, TableDenoiser(1)

    def step_of(x_t, step):
        alpha_t, alpha_s = step / num_steps, (step + 1) / num_steps
        sigma = min(eta, (1 - alpha_s) / alpha_t) if alpha_t else eta
        becomes = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
        written = [n for n in range(1, 1 + LENGTH) if x_t[n] != MASK]
        for state, p in independent_positions(x_t, becomes * denoiser.log_probs(torch.tensor(x_t)).exp()):
            for again in itertools.product([False, True], repeat=len(written)):
                after = list(state)
                for n, is_again in zip(written, again, strict=True):
                    after[n] = MASK if is_again else after[n]
                yield tuple(after), p * math.prod(sigma if is_again else 1 - sigma for is_again in again)

    exact = exact_by_states(num_steps, step_of)
    assert sum(exact.values()) == pytest.approx(1)
    rule = Ancestral(Polynomial(), remask=eta)
    assert abs(chi_square_z(tally(draw(rule, 5000, num_steps=num_steps, seed=4)), exact, 5000)) < 4


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_block_steps_match_manual_computation_including_steps_that_only_remask(eta):
    """Step by step with the same numbers; some steps ask the network for nothing."""
    denoiser, num_steps, seed, only_again = TableDenoiser(1), 9, 6, 0
    written = in_a_block(Ancestral(Polynomial(), remask=eta), 60, num_steps=num_steps, seed=seed)
    for number in range(60):
        numbers = generator(seed, SAMPLING, 0, number).random((num_steps, 2, 1 + LENGTH))
        x_t = [0, MASK, MASK, MASK]
        for step in range(num_steps):
            alpha_t, alpha_s = step / num_steps, (step + 1) / num_steps
            sigma = min(eta, (1 - alpha_s) / alpha_t) if alpha_t else eta
            log_probs, after = denoiser.log_probs(torch.tensor(x_t)), list(x_t)
            for n in range(1, 1 + LENGTH):
                coin = numbers[step, 1, n]
                if x_t[n] == MASK and coin >= 1 - (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t):
                    after[n] = int((log_probs[n].exp().cumsum(0) <= numbers[step, 0, n]).sum())
                elif x_t[n] != MASK and coin < sigma:
                    after[n] = MASK
            only_again += after != x_t and all(now in (MASK, before) for before, now in zip(x_t, after, strict=True))
            x_t = after
        assert written[number].tolist() == x_t
    assert only_again > 0 or eta == 0


@pytest.mark.parametrize("schedule", [Polynomial(), Cosine()], ids=str)
def test_remasking_preserves_the_masked_share_and_the_given_tokens(schedule):
    num_rows, num_steps, again = 4000, 8, []
    canvas = empty_canvas(num_rows)
    canvas.ids[:, 2], canvas.is_masked[:, 2] = 3, False
    canvas = Canvas(canvas.ids, canvas.is_masked)
    before = canvas.is_masked

    def look(step, steps, now):
        nonlocal before
        again.append(int((now.is_masked & ~before).sum()))
        before = now.is_masked
        assert not now.is_masked[:, 2].any() and (now.ids[:, 2] == 3).all()
        expected = schedule.mask_probability(torch.tensor(1 - step / steps, dtype=torch.float64)).item()
        share = now.is_masked[:, [1, 3]].double().mean().item()
        assert abs(share - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / (2 * num_rows)) + 1e-12

    sample(TableDenoiser(1), canvas, Ancestral(schedule, remask=0.5), FULL, num_steps=num_steps, on_step=look)
    assert sum(again) > num_rows / 2 and again[-1] == 0


def selected(rule, *confidence):
    values = torch.tensor([confidence], dtype=torch.float64)
    is_masked = values > float("-inf")
    return (
        rule.selected(Canvas(torch.zeros_like(is_masked).long(), is_masked), is_masked, values, NOW, THEN)[0]
        .int()
        .tolist()
    )


def test_threshold_selects_proposals_above_it_and_the_best():
    log = [math.log(p) for p in (0.95, 0.5, 0.91, 0.2)]
    assert selected(Threshold(0.9), *log) == [1, 0, 1, 0]
    assert selected(Threshold(0.96), *log) == [1, 0, 0, 0]  # the best, although it is below
    assert selected(Threshold(0.0), *log) == [1, 1, 1, 1]
    assert selected(Threshold(1.0), 0.0, 0.0, log[0]) == [1, 0, 0]  # no probability exceeds 1: one token per call
    assert selected(Threshold(0.9), float("-inf"), log[1], log[3]) == [0, 1, 0]  # the first is not masked


def test_factor_selects_the_largest_n_below_it():
    """(n + 1)(1 - p_n) of p = .95, .9, .8, .3: .1, .3, .8, 3.5."""
    log = [math.log(p) for p in (0.9, 0.3, 0.95, 0.8)]
    assert selected(Factor(1.0), *log) == [1, 0, 1, 1]
    assert selected(Factor(0.5), *log) == [1, 0, 1, 0]
    assert selected(Factor(0.05), *log) == [0, 0, 1, 0]
    assert selected(Factor(4.0), *log) == [1, 1, 1, 1]


def test_entropy_bounded_selects_the_longest_run_within_the_bound():
    """Sorted .05, .06, .3, 1: the sum without the largest is 0, .05, .11, .41."""
    entropy = [-0.3, -0.05, -1.0, -0.06]
    assert selected(EntropyBounded(0.1), *entropy) == [0, 1, 0, 1]
    assert selected(EntropyBounded(0.12), *entropy) == [1, 1, 0, 1]
    assert selected(EntropyBounded(0.5), *entropy) == [1, 1, 1, 1]
    assert selected(EntropyBounded(0.0), *entropy) == [0, 1, 0, 0]


def test_confidence_is_computed_at_temperature_1():
    probs = torch.tensor([[0.5, 0.4, 0.1], [0.7, 0.2, 0.1]], dtype=torch.float64)
    uniform = torch.tensor([0.95, 0.0], dtype=torch.float64)  # tokens 2 and 0
    for temperature, top_p in ((1.0, 1.0), (1.5, 1.0), (1.0, 0.99)):
        tokens, log_p = sample_tokens(probs.log(), uniform, temperature, top_p, "probability")
        assert tokens.tolist() == [2, 0] and log_p.exp().tolist() == pytest.approx([0.1, 0.7])
        margin, entropy = (
            sample_tokens(probs.log(), uniform, temperature, top_p, kind)[1].tolist() for kind in ("margin", "entropy")
        )
        assert margin == pytest.approx([0.1, 0.5])
        assert entropy == pytest.approx([sum(p * math.log(p) for p in row) for row in probs.tolist()])


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 2.2e-308, 1e-300])
def test_a_temperature_near_0_samples_the_most_probable_token_without_overflow(temperature):
    logits = torch.tensor([[3.0, -2.0, 3.5, float("-inf")], [-1e30, -2e30, float("-inf"), -3e30]])
    uniform = torch.tensor([0.999, 0.0], dtype=torch.float64)
    for top_p in (1.0, 0.5, 5e-324):
        assert sample_tokens(logits, uniform, temperature, top_p)[0].tolist() == [2, 0]
        assert probabilities(logits, temperature, top_p).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


def test_confidence_in_a_token_of_tiny_probability_is_finite():
    """A high temperature samples such a token; -inf would rank it with the positions without a proposal."""
    logits = torch.tensor([[0.0, 2000.0]], dtype=torch.float64)
    tokens, confidence = sample_tokens(logits, torch.zeros(1, dtype=torch.float64), 1e300, 1.0)
    assert tokens.tolist() == [0] and bool(confidence.isfinite().all())


NOTHING = torch.full((1, 3), float("-inf"))
NOT_FINITE = torch.tensor([[0.0, float("nan"), 1.0]])


@pytest.mark.parametrize("logits", [NOTHING, NOT_FINITE], ids=["banned", "NaN"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.9), (0.0, 1.0)])
def test_a_row_without_allowed_tokens_returns_minus_1_and_does_not_stay_masked(logits, temperature, top_p):
    uniform = torch.tensor([0.3], dtype=torch.float64)
    assert sample_tokens(logits, uniform, temperature, top_p)[0].tolist() == [-1]
    probs = probabilities(logits, temperature, top_p)
    for becomes in (probs, 0.25 * probs):
        tokens, is_drawn = sample_or_stay(becomes, uniform)
        assert tokens.tolist() == [-1] and is_drawn.tolist() == [True]


@pytest.mark.parametrize("noise", ["float64", "float32_gumbel"])
@pytest.mark.parametrize(
    "rule",
    [Ancestral(Polynomial(), joint=True), Tweedie(Polynomial(), VOCAB), FirstHitting()],
    ids=["joint", "tweedie", "choosing"],
)
def test_banning_all_tokens_of_a_position_raises_an_error(rule, noise):
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="no token at position 2: every logit is -inf"):
            sample(
                TableDenoiser(),
                empty_canvas(4),
                rule,
                FULL,
                num_steps=3,
                adjust=chained(pattern({2: [1]}), banned([1])),
                noise=noise, temperature=temperature,
            )  # fmt: skip


def test_nan_logits_raise_an_error():
    class Broken(OneBlock):
        def reduce_logits(self, rows, fn, *arguments):
            return fn(rows * float("nan"), *arguments)

    with pytest.raises(ValueError, match="logits are not finite"):
        sample(Broken(), empty_canvas(2), FirstHitting(), FULL, num_steps=1)
    with pytest.raises(ValueError, match="logits are not finite"):
        generate_blocks(
            Broken(), [Request([0], LENGTH)], FirstHitting(), block_tokens=1 + LENGTH, context_tokens=8, num_steps=1
        )


def test_margin_and_probability_rank_differently():
    """Position 1 has two probable tokens, position 2 a single, less probable one."""

    class Two(TableDenoiser):
        def hidden(self, ids, visibility):
            rows = torch.tensor(
                [[1, 1, 1, 1], [0.48, 0.46, 0.03, 0.03], [0.4, 0.2, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]],
                dtype=torch.float64,
            )
            return rows.log().repeat(len(ids), 1, 1)

    for by, first in (("probability", 1), ("margin", 2)):
        seen = []
        rule = Confidence(Polynomial(), by)
        sample(
            Two(),
            empty_canvas(1),
            rule,
            FULL,
            num_steps=3,
            temperature=0,
            on_step=lambda *now, seen=seen: seen.append(now[2]),
        )
        assert (~seen[0].is_masked[0]).nonzero()[:, 0].tolist() == [0, first]


@pytest.mark.parametrize(
    "rule",
    [FirstHitting(), Threshold(0.6), Factor(1.0), EntropyBounded(0.5), Confidence(Polynomial(), "margin")],
    ids=str,
)
def test_every_rule_reveals_the_whole_canvas_and_counts_its_calls(rule):
    seen = []
    done = sample(
        TableDenoiser(1), empty_canvas(20), rule, FULL, num_steps=LENGTH, on_step=lambda *now: seen.append(now[:2])
    )
    assert 1 <= done.num_network_calls <= LENGTH and seen[-1] == (LENGTH, LENGTH)
    assert (done.ids < VOCAB).all()
    if isinstance(rule, FirstHitting):
        assert done.num_network_calls == LENGTH


@CANVASES
def test_adjustments_ban_force_and_restrict_tokens(draw):
    def only_row_1(logits, rows, positions):
        return torch.where(
            ((rows == 1) & (positions == 1))[:, None] & (torch.arange(VOCAB) != 0), float("-inf"), logits
        )

    adjust = chained(banned([2]), pattern({1: [0, 3], 2: [1, 2]}), only_row_1, None, forced({3: 2}))
    for rule in (FirstHitting(), Threshold(0.7), Ancestral(Polynomial())):
        ids = draw(rule, 300, num_steps=2, adjust=adjust)
        assert set(ids[:, 1].tolist()) == {0, 3} and ids[1, 1] == 0
        assert set(ids[:, 2].tolist()) == {1}  # the pattern without the banned tokens
        assert set(ids[:, 3].tolist()) == {2}  # forced, although banned
    with pytest.raises(ValueError, match="no token at position 2: every logit is -inf"):
        draw(FirstHitting(), 5, adjust=chained(banned([2]), pattern({2: [2]})))
    with pytest.raises(ValueError, match="allows no token at position 1"):
        pattern({1: []})
    assert chained(None) is None


def test_a_pattern_conditions_the_distribution():
    """One position: the law is the model's within the allowed set."""
    denoiser, canvas = TableDenoiser(1), empty_canvas(8000)
    canvas.is_masked[:, 1:3] = False
    ids = sample(
        denoiser, Canvas(canvas.ids, canvas.is_masked), FirstHitting(), FULL, num_steps=1, adjust=pattern({3: [1, 2]})
    ).ids
    probs = denoiser.log_probs(torch.tensor([0, 0, 0, MASK]))[3].exp()[[1, 2]]
    counts = {(0, 0, 0, word): int((ids[:, 3] == word).sum()) for word in (1, 2)}
    exact = {(0, 0, 0, word): (p / probs.sum()).item() for word, p in zip((1, 2), probs, strict=True)}
    assert abs(chi_square_z(counts, exact, 8000)) < 4
    assert np.isclose(sum(exact.values()), 1)
