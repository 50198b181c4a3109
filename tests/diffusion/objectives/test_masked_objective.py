"""MD4's continuous-time bound against exact enumeration on a vocabulary of 4, and the invariances it must have."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers.toy import LENGTH, MASK, TableDenoiser, exact_nelbo, texts

from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.denoiser import Batch
from dlm_ray.diffusion.draws import DrawKey, make_draw
from dlm_ray.diffusion.likelihood import token_nats
from dlm_ray.diffusion.objectives import Autoregressive, Masked
from dlm_ray.diffusion.schedules import Cosine, Polynomial
from dlm_ray.diffusion.visibility import Visibility

FULL = Visibility("bidirectional")
SCHEDULES = [Polynomial(1.0), Polynomial(2.0), Cosine()]


def batch_of(x_0, is_masked, weight):
    scored = np.flatnonzero(is_masked)
    maskable = np.ones_like(is_masked)
    maskable[:, 0] = False
    draw = make_draw(np.full(len(is_masked), 0.5), is_masked, scored, np.full(len(scored), weight), maskable)
    return Batch(x_0, draw, FULL)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_bound_equals_the_enumerated_one_on_any_schedule(schedule):
    """Integrates the objective over t by quadrature and over masks by enumeration.

    T drops out of the enumerated form.
    """
    denoiser, x_0 = TableDenoiser(), torch.tensor([0, 2, 1, 3])
    nodes, node_weights = np.polynomial.legendre.leggauss(200)
    integral = 0.0
    for t, dt in zip((nodes + 1) / 2, node_weights / 2, strict=True):
        time = torch.tensor(t, dtype=torch.float64)
        p, weight = schedule.mask_probability(time).item(), schedule.weight(time).item()
        for pattern in itertools.product([False, True], repeat=LENGTH):
            if not any(pattern):
                continue
            probability = math.prod(p if masked else 1 - p for masked in pattern)
            batch = batch_of(x_0[None], np.array([[False, *pattern]]), 1.0)
            nll = Masked(Absorbing(schedule))(denoiser, batch).weighted_sum.item()
            integral += dt * weight * probability * nll
    # float32 weights of 1 are exact; the quadrature is what limits the cosine's end point.
    assert integral == pytest.approx(exact_nelbo(denoiser, x_0), rel=1e-9 if schedule != Cosine() else 1e-6)


def test_the_bound_is_above_the_negative_log_likelihood_of_the_best_order():
    """exp(-bound) over all texts sums to at most 1: it bounds the likelihood of a proper distribution."""
    denoiser = TableDenoiser(3)
    assert sum(math.exp(-exact_nelbo(denoiser, x_0)) for x_0 in texts()) <= 1 + 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_training_draws_estimate_the_bound_without_bias(schedule):
    denoiser, rows, steps = TableDenoiser(), 64, 40
    x_0 = torch.tensor([0, 2, 1, 3]).repeat(rows, 1)
    maskable = np.ones((rows, 1 + LENGTH), dtype=bool)
    maskable[:, 0] = False
    objective = Masked(Absorbing(schedule))
    values = []
    for step in range(steps):
        draw = objective.draw(DrawKey(1, step, range(rows), rows), None, maskable)
        values.append(objective(denoiser, Batch(x_0, draw, FULL)).weighted_sum.item() / rows)
    standard_error = np.std(values, ddof=1) / math.sqrt(steps)
    assert abs(np.mean(values) - exact_nelbo(denoiser, x_0[0])) < 4 * standard_error


def test_the_evaluated_bound_agrees_and_its_interval_covers_it():
    denoiser = TableDenoiser()
    x_0 = torch.stack(texts()[::4])
    scored = token_nats(
        denoiser,
        Masked(),
        x_0.numpy(),
        np.zeros(x_0.shape, dtype=np.int32),
        lambda _: FULL,
        torch.device("cpu"),
        num_draws=256,
    )
    exact = np.array([exact_nelbo(denoiser, row) for row in x_0])
    standard_error = scored.draw_totals.std(ddof=1) / math.sqrt(256)
    assert abs(scored.nats.sum() - exact.sum()) < 4 * standard_error
    assert scored.draw_totals.mean() == pytest.approx(scored.nats.sum())
    assert (scored.nats[:, 0] == 0).all()


def test_a_uniform_model_costs_ln_v_a_token():
    class Uniform(TableDenoiser):
        def hidden(self, input_ids, visibility):
            return torch.zeros(*input_ids.shape, 4, dtype=torch.float64)

    assert exact_nelbo(Uniform(), torch.tensor([0, 1, 2, 3])) == pytest.approx(LENGTH * math.log(4))


def test_what_is_masked_is_never_inferred_from_ids():
    """A text that contains the mask's id as a word: only the drawn positions are scored."""
    is_masked = np.array([[False, True, False, False]])
    batch = batch_of(torch.tensor([[0, 2, MASK, 3]]), is_masked, 1.0)
    result = Masked()(TableDenoiser(), batch)
    log_probs = TableDenoiser().log_probs(torch.tensor([0, MASK, MASK, 3]))
    assert result.weighted_sum.item() == pytest.approx(-log_probs[1, 2].item())


def test_normalisations_count_all_tokens_or_the_masked_ones():
    draw = make_draw(
        np.array([0.5]),
        np.array([[False, True, False, True]]),
        np.array([1, 3]),
        np.ones(2),
        np.array([[False, True, True, True]]),
    )
    assert Masked(None, "all_tokens").count(draw) == 3
    assert Masked(None, "global_masked").count(draw) == 2
    assert Autoregressive().count(draw) == 3


def diffullama_loss(nll, weight):
    """What the authors' trainers compute for one micro-batch.

    The weighted sum over its masked tokens, divided by their number.
    """
    return (weight * nll).sum() / (weight > 0).sum()


def test_the_global_count_of_masked_tokens_is_diffullamas_normalisation_without_its_dependence_on_the_micro_batch():
    denoiser, objective, rows = TableDenoiser(), Masked(normalize_by="global_masked"), 16
    x_0 = torch.tensor([0, 2, 1, 3]).repeat(rows, 1)
    maskable = np.ones((rows, 1 + LENGTH), dtype=bool)
    maskable[:, 0] = False

    def parts(micro_batch):
        for start in range(0, rows, micro_batch):
            chosen = range(start, start + micro_batch)
            draw = objective.draw(DrawKey(1, 0, chosen, rows), None, maskable[chosen])
            batch = Batch(x_0[chosen], draw, FULL)
            yield (
                objective(denoiser, batch).weighted_sum,
                objective.count(draw),
                (objective.token_nll(denoiser, batch), draw.weight),
            )

    sums, theirs = {}, {}
    for micro_batch in (16, 4, 1):
        found = list(parts(micro_batch))
        sums[micro_batch] = (sum(loss for loss, _, _ in found) / sum(count for _, count, _ in found)).item()
        theirs[micro_batch] = np.mean([diffullama_loss(*scored).item() for _, count, scored in found if count])
    assert sums[16] == pytest.approx(theirs[16])
    assert sums[4] == pytest.approx(sums[16], rel=1e-6) and sums[1] == pytest.approx(sums[16], rel=1e-6)
    assert theirs[1] > 1.1 * theirs[16]  # one row a micro-batch: 1/t times the mean, and small t weighs too much


@dataclass(frozen=True)
class MaskAndReplace(Absorbing):
    """A forward process of somebody's own: of what is masked, every other token is a wrong word instead of the mask."""

    def inputs(self, denoiser, batch):
        x_t = super().inputs(denoiser, batch)
        odd = batch.draw.is_masked & (torch.arange(x_t.shape[1]) % 2 == 1)
        return torch.where(odd, (batch.x_0 + 1) % 4, x_t)


def test_another_forward_process_is_an_argument_of_the_objective():
    objective, denoiser = Masked(MaskAndReplace()), TableDenoiser()
    x_0, is_masked = torch.tensor([[0, 2, 1, 3]]), np.array([[False, True, True, False]])
    loss = objective(denoiser, batch_of(x_0, is_masked, 1.0)).weighted_sum.item()
    log_probs = denoiser.log_probs(torch.tensor([0, 3, MASK, 3]))
    assert loss == pytest.approx(-(log_probs[1, 2] + log_probs[2, 1]).item())


@pytest.mark.parametrize(
    ("weight", "expected"), [("elbo", lambda t: 1 / t), ("flat", lambda t: t / t), ("time", lambda t: t)]
)
def test_diffullamas_three_weights_are_switches_of_training_and_not_of_the_bound(weight, expected):
    maskable = np.ones((12, 30), dtype=bool)
    maskable[:, 0] = False
    objective = Masked(Absorbing(weight=weight))
    draw = objective.draw(DrawKey(0, 0, range(12), 12), None, maskable)
    t = draw.t[draw.scored // 30]
    assert torch.allclose(draw.weight[: draw.num_scored], expected(t)[: draw.num_scored])
    scored = objective.evaluation_draw(0, [(0, row) for row in range(12)], np.linspace(0.1, 0.9, 12), None, maskable)
    assert torch.allclose(scored.weight[: scored.num_scored], 1 / scored.t[scored.scored // 30][: scored.num_scored])
