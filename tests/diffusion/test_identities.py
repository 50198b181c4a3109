"""The objectives tied to each other by exact identities.

3 tokens, 4 words, float64, every mask enumerated, t by quadrature.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.toy import LENGTH, VOCAB, TableDenoiser, exact_nelbo

from dlm_ray.diffusion.absorbing import Absorbing, _counted
from dlm_ray.diffusion.denoiser import Batch
from dlm_ray.diffusion.draws import make_draw
from dlm_ray.diffusion.objectives import D3pm, GenMD4, Masked, Sedd, TauLDR
from dlm_ray.diffusion.objectives.genmd4 import T_1
from dlm_ray.diffusion.schedules import Cosine, Geometric, Polynomial, at
from dlm_ray.diffusion.visibility import Visibility

FULL = Visibility("bidirectional")
X_0 = torch.tensor([[0, 2, 1, 3]])
MASKABLE = np.array([[False, True, True, True]])
PATTERNS = [np.array([[False, *pattern]]) for pattern in itertools.product([False, True], repeat=LENGTH)]
NODES, NODE_WEIGHTS = (
    np.concatenate(parts)
    for parts in zip(*[((x + 1) / 2, w / 2) for x, w in [np.polynomial.legendre.leggauss(60)]], strict=True)
)


class Scaled(TableDenoiser):
    """The table's model with a score of a chosen total Z at every position."""

    def __init__(self, seed=0, z=1.0):
        super().__init__(seed)
        self.z = z

    def reduce_logits(self, rows, fn, *arguments):
        return fn(rows.log_softmax(-1) + math.log(VOCAB * self.z), *arguments)


class Uniform(TableDenoiser):
    """A head of zeros."""

    def hidden(self, input_ids, visibility):
        return torch.zeros(*input_ids.shape, VOCAB, dtype=torch.float64)


def genmd4():
    """With exponents that are 1 to the last digit of float64."""
    objective = GenMD4(Absorbing(), VOCAB).double()
    torch.nn.init.constant_(objective.theta, math.log(math.e - 1))
    return objective


def draw(is_masked, scored, weight, t):
    """A draw in float64: what the production's float32 would round is exact here."""
    made = make_draw(np.array([t]), is_masked, np.flatnonzero(scored), np.full(int(scored.sum()), weight), MASKABLE)
    weights = torch.zeros(len(made.weight), dtype=torch.float64)
    weights[: made.num_scored] = weight
    return Batch(
        X_0, type(made)(**{**vars(made), "t": torch.tensor([t], dtype=torch.float64), "weight": weights}), FULL
    )


def probability(is_masked, p):
    """Of a pattern, when each of the tokens is masked with probability p, or p[n]."""
    each = np.broadcast_to(p, LENGTH)
    return float(np.where(is_masked[0, 1:], each, 1 - each).prod())


def integral(f, start=0.0, end=1.0):
    """int f(t) dt, exact for the polynomials in t that the linear schedule gives."""
    return sum(w * (end - start) * f(start + (end - start) * x) for x, w in zip(NODES, NODE_WEIGHTS, strict=True))


def enumerated(objective, denoiser, schedule=None, start=0.0, power=1):
    """The continuous-time loss of an objective of the masked family, by its own forward."""
    schedule = schedule or Polynomial()

    def at_time(u):
        t, jacobian = u**power, power * u ** (power - 1)  # smooths a schedule that is steep at 0
        p, weight = at(schedule.mask_probability, t), at(schedule.weight, t)
        return jacobian * sum(
            probability(is_masked, p) * objective(denoiser, draw(is_masked, is_masked, weight, t)).weighted_sum.item()
            for is_masked in PATTERNS
        )

    return integral(at_time, start)


@pytest.mark.parametrize("seed", [0, 4])
def test_md4_is_the_sum_over_subsets_on_every_schedule(seed):
    denoiser = TableDenoiser(seed)
    exact = exact_nelbo(denoiser, X_0[0])
    assert enumerated(Masked(), denoiser) == pytest.approx(exact, rel=1e-10)
    assert enumerated(Masked(), denoiser, Polynomial(3.0)) == pytest.approx(exact, rel=1e-10)
    assert enumerated(Masked(), denoiser, Polynomial(0.5), power=2) == pytest.approx(exact, rel=1e-10)
    assert enumerated(Masked(), denoiser, Cosine()) == pytest.approx(exact, rel=1e-10)
    # The geometric schedule stops short of both ends, by 1e-5 and 2e-9 of the tokens.
    assert enumerated(Masked(), denoiser, Geometric()) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("estimator", ["one_token", "all_masked"])
def test_tauldr_summed_over_its_jumps_is_md4(estimator):
    denoiser, objective = TableDenoiser(), TauLDR(Absorbing(), estimator=estimator)

    def at_time(t):
        total = 0.0
        for is_masked in PATTERNS:
            unmasked = np.flatnonzero(~is_masked[0] & MASKABLE[0])
            for i in unmasked:
                jumped = np.zeros_like(is_masked)
                jumped[0, i] = True
                made = objective.after_jump(torch.tensor([t], dtype=torch.float64), is_masked, jumped, MASKABLE)
                after = is_masked | jumped
                scored = after if estimator == "all_masked" else jumped
                # The weights are made in float64 and kept in float32; the identity is about the former.
                weight = made.weight[0].double().item()
                exact = (1 / (1 - t)) * len(unmasked) / (1 if estimator == "one_token" else after.sum())
                assert weight == pytest.approx(exact, rel=1e-6) and made.num_scored == scored.sum()
                loss = objective(denoiser, draw(after, scored, exact, t)).weighted_sum.item()
                total += probability(is_masked, t) / len(unmasked) * loss
        return total

    assert integral(at_time) == pytest.approx(exact_nelbo(denoiser, X_0[0]), rel=1e-10)


def test_sedd_at_z_1_is_md4_and_a_scaled_score_costs_n_times_c_minus_1_minus_ln_c():
    exact = exact_nelbo(TableDenoiser(), X_0[0])
    sedd = Sedd(vocab_size=VOCAB)
    assert enumerated(sedd, Scaled()) == pytest.approx(exact, rel=1e-10)
    for c in (0.3, 1.2, 5.0):
        assert enumerated(sedd, Scaled(z=c)) - exact == pytest.approx(LENGTH * (c - 1 - math.log(c)), rel=1e-9)


def test_sedd_is_the_papers_score_entropy():
    """The literal loss with sbar, log s = f - ln(expm1 sbar) - ln V, and the constant that makes it 0 at the true
    score.
    """
    denoiser, t = TableDenoiser(2), 0.37
    is_masked = np.array([[False, True, False, True]])
    weight = at(Polynomial().weight, t)
    loss = Sedd(vocab_size=VOCAB)(denoiser, draw(is_masked, is_masked, weight, t)).weighted_sum.item()
    sbar, dsbar = -math.log1p(-t), 1 / (1 - t)
    r = 1 / math.expm1(sbar)
    logits = denoiser.hidden(torch.where(torch.from_numpy(is_masked), denoiser.mask_id, X_0), None)[0]
    literal = 0.0
    for n in np.flatnonzero(is_masked[0]):
        log_s = logits[n] - math.log(math.expm1(sbar)) - math.log(VOCAB)
        literal += dsbar * (log_s.exp().sum() - r * log_s[X_0[0, n]] + r * (math.log(r) - 1)).item()
    assert loss == pytest.approx(literal, rel=1e-12)


def test_genmd4_with_all_exponents_1_is_md4():
    denoiser, objective = TableDenoiser(), genmd4()

    def at_time(t):
        total = 0.0
        for is_masked in PATTERNS:
            batch = draw(is_masked, MASKABLE, 1.0, t)
            total += probability(is_masked, t) * (batch.draw.weight * objective.token_nll(denoiser, batch)).sum().item()
        return total

    # token_nll holds the factor 1 - t_1 of the integral: what is left is the mean over t in [t_1, 1].
    bound = integral(at_time, T_1) / (1 - T_1)
    md4 = enumerated(Masked(), denoiser, start=T_1)
    assert bound == pytest.approx(md4 + LENGTH * T_1 * math.log(VOCAB), rel=1e-10)


def discrete(denoiser, num_timesteps, schedule=None):
    """MD4's loss at T times, by the process's own weights."""
    process = Absorbing(schedule or Polynomial(), num_timesteps=num_timesteps)
    total = 0.0
    for i in range(1, num_timesteps + 1):
        t = i / num_timesteps
        weight = process.weights(np.array([t]), np.array([False]))[0]
        p = at(process.schedule.mask_probability, t)
        total += sum(
            probability(is_masked, p)
            * Masked(process)(denoiser, draw(is_masked, is_masked, weight, t)).weighted_sum.item()
            for is_masked in PATTERNS
        )
    return total / num_timesteps


def test_discrete_time_tends_to_continuous_time():
    denoiser = TableDenoiser()
    exact = exact_nelbo(denoiser, X_0[0])
    gaps = [abs(discrete(denoiser, num_timesteps) - exact) / exact for num_timesteps in (10, 100, 1000)]
    assert gaps[2] < 1e-3 and gaps[2] < gaps[1] / 8 < gaps[0] / 64


@pytest.mark.parametrize("schedule", [Polynomial(), Cosine()], ids=str)
def test_d3pm_without_epsilon_is_the_closed_form(schedule):
    denoiser, num_timesteps = TableDenoiser(), 8
    process = Absorbing(schedule, num_timesteps=num_timesteps)
    literal, closed = D3pm(process, epsilon=1e-13), 0.0
    total = 0.0
    for i in range(1, num_timesteps + 1):
        t = i / num_timesteps
        p = at(schedule.mask_probability, t)
        for is_masked in PATTERNS:
            result = literal(denoiser, draw(is_masked, MASKABLE, float(num_timesteps), t))
            total += probability(is_masked, p) * result.weighted_sum.item() / num_timesteps
            closed += probability(is_masked, p) * result.by_token["closed_form"].item() / num_timesteps
    assert closed == pytest.approx(discrete(denoiser, num_timesteps, schedule), rel=1e-12)
    assert total == pytest.approx(closed, rel=1e-9)


def test_d3pms_epsilon_makes_the_bound_too_small_and_more_so_for_more_words():
    """One masked token, uniform prediction, t = 0.5 of T = 1000, epsilon 1e-6.

    No longer an upper bound at the size of a language.
    """
    num_timesteps, t = 1000, 0.5
    objective = D3pm(Absorbing(num_timesteps=num_timesteps), epsilon=1e-6)
    alpha_t, alpha_s = (torch.tensor([value], dtype=torch.float64) for value in (1 - t, 1 - t + 1 / num_timesteps))

    def bias(vocab):
        logits = torch.zeros(1, vocab, dtype=torch.float64)
        kl, _ = objective.posterior_kl(logits, torch.tensor([3]), torch.tensor([True]), alpha_s, alpha_t)
        return kl.item() / (((alpha_s - alpha_t) / (1 - alpha_t)).item() * math.log(vocab)) - 1

    assert -0.001 < bias(256) < 0
    assert -0.05 < bias(50_257) < -0.02


def test_d3pm_with_a_small_epsilon_is_not_finite_in_float32_and_the_closed_form_is():
    objective = D3pm(Absorbing(num_timesteps=1000), epsilon=1e-50)
    ones = torch.ones(1)
    kl, nll = objective.posterior_kl(
        torch.zeros(1, 5), torch.tensor([1]), torch.tensor([True]), 0.501 * ones, 0.5 * ones
    )
    assert not torch.isfinite(kl) and torch.isfinite(nll)


def count_expectation(maskable, score):
    """E of weight * score(mask) over every order of the tokens and every stratum of k, by the production's sampler."""
    num = int(maskable.sum())
    total = 0.0
    orders = list(itertools.permutations(range(num)))
    for order in orders:
        uniform = np.full(maskable.shape, 0.5)
        uniform[maskable] = (np.array(order) + 0.5) / num
        for k in range(num):
            is_masked, weight = _counted(uniform, np.array([(k + 0.5) / num]), maskable)
            total += weight[0] * score(is_masked)
    return total / len(orders) / num


def cross_entropy(denoiser, is_masked):
    log_probs = denoiser.log_probs(torch.where(torch.from_numpy(is_masked), denoiser.mask_id, X_0)[0])
    return -sum(log_probs[n, X_0[0, n]].item() for n in np.flatnonzero(is_masked[0]))


def test_the_count_sampler_is_unbiased_for_the_row_and_for_a_block_behind_a_clean_context():
    denoiser = TableDenoiser()
    row = count_expectation(MASKABLE, lambda is_masked: cross_entropy(denoiser, is_masked))
    assert row == pytest.approx(exact_nelbo(denoiser, X_0[0]), rel=1e-12)
    block = np.array([[False, False, True, True]])  # the ELBO of BD3-LM's block, by hand
    by_hand = sum(
        cross_entropy(denoiser, np.array([[False, False, a, b]])) / 2
        for a, b in [(True, False), (False, True), (True, True)]
    )
    assert count_expectation(block, lambda is_masked: cross_entropy(denoiser, is_masked)) == pytest.approx(
        by_hand, rel=1e-12
    )


def test_the_count_sampler_at_block_size_1_is_the_autoregressive_loss():
    """One token, always masked, weight 1."""
    for n in range(1, 1 + LENGTH):
        maskable = np.zeros((1, 1 + LENGTH), dtype=bool)
        maskable[0, n] = True
        is_masked, weight = _counted(np.full(maskable.shape, 0.7), np.array([0.01]), maskable)
        assert (is_masked == maskable).all() and weight[0] == 1.0


def test_the_count_sampler_over_the_row_is_ardms_loss():
    """ARDM: the mean over orders sigma and steps of D / (D - i + 1) sum over what is not yet seen of -log p."""
    denoiser, total = TableDenoiser(), 0.0
    orders = list(itertools.permutations(range(1, 1 + LENGTH)))
    for order in orders:
        for i in range(1, LENGTH + 1):
            is_masked = np.zeros((1, 1 + LENGTH), dtype=bool)
            is_masked[0, list(order[i - 1 :])] = True
            total += cross_entropy(denoiser, is_masked) / (LENGTH - i + 1)
    ardm = total / len(orders)
    assert count_expectation(MASKABLE, lambda is_masked: cross_entropy(denoiser, is_masked)) == pytest.approx(
        ardm, rel=1e-12
    )


@pytest.mark.parametrize("kind", ["masked", "sedd", "genmd4", "tauldr", "count", "d3pm"])
def test_a_head_of_zeros_costs_ln_v_a_token(kind):
    """The first loss of a zero-initialised head.

    GenMD4 splits it between the integral and the reconstruction, D3PM's epsilon is tiny.
    """
    denoiser, expected = Uniform(), LENGTH * math.log(VOCAB)
    if kind == "masked":
        value = enumerated(Masked(), denoiser)
    elif kind == "sedd":
        value = enumerated(Sedd(vocab_size=VOCAB), denoiser)
    elif kind == "count":
        value = count_expectation(MASKABLE, lambda is_masked: cross_entropy(denoiser, is_masked))
    elif kind == "d3pm":
        process = Absorbing(num_timesteps=4)
        batches = [(probability(m, i / 4), draw(m, MASKABLE, 4.0, i / 4)) for m in PATTERNS for i in range(1, 5)]
        value = sum(p * D3pm(process, epsilon=1e-13)(denoiser, batch).weighted_sum.item() / 4 for p, batch in batches)
    elif kind == "genmd4":
        objective = genmd4()
        value = integral(
            lambda t: sum(
                probability(m, t) * (b.draw.weight * objective.token_nll(denoiser, b)).sum().item()
                for m, b in [(m, draw(m, MASKABLE, 1.0, t)) for m in PATTERNS]
            ),
            T_1,
        ) / (1 - T_1)
    else:
        value = integral(
            lambda t: sum(
                probability(m, t)
                / (1 - t)
                * sum(cross_entropy(denoiser, (np.arange(4) == i)[None]) for i in np.flatnonzero(~m[0] & MASKABLE[0]))
                for m in PATTERNS
            )
        )
    assert value == pytest.approx(expected, rel=1e-9)
