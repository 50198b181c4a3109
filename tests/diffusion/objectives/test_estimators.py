"""What the draws of the objectives estimate.

The same bound, without bias, some with less variance than others; and GenMD4's gradient.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers.toy import LENGTH, VOCAB, TableDenoiser, exact_nelbo

from dlm_ray.diffusion.absorbing import Absorbing, Clip
from dlm_ray.diffusion.denoiser import Batch
from dlm_ray.diffusion.draws import DrawKey, times
from dlm_ray.diffusion.objectives import GenMD4, Masked, TauLDR
from dlm_ray.diffusion.objectives.genmd4 import T_1
from dlm_ray.diffusion.schedules import build
from dlm_ray.diffusion.visibility import Visibility

FULL = Visibility("bidirectional")
X_0 = torch.tensor([0, 2, 1, 3])
ROWS, STEPS = 128, 60


def estimates(objective, seed=0, rows=ROWS, steps=STEPS, denoiser=None):
    """[steps] means over the rows of a batch: the bound of one text."""
    denoiser = denoiser or TableDenoiser()
    copies = objective.draws_per_sequence
    x_0 = X_0.repeat(rows * copies, 1)
    maskable = np.ones(x_0.shape, dtype=bool)
    maskable[:, 0] = False
    values = []
    for step in range(steps):
        draw = objective.draw(DrawKey(seed, step, range(rows * copies), rows * copies), x_0.numpy(), maskable)
        with torch.no_grad():
            result = objective(denoiser, Batch(x_0, draw, FULL))
        values.append((result.by_token.get("bound", result.weighted_sum) / rows / copies).item())
    return np.array(values)


ESTIMATORS = {
    **{
        name: Masked(Absorbing(build(name, 3.0 if name == "polynomial" else None)))
        for name in ("linear", "polynomial", "cosine", "log")
    },
    "square": Masked(Absorbing(build("square"))),
    "square_root": Masked(Absorbing(build("square_root"))),
    "geometric": Masked(Absorbing(build("geometric"))),
    "antithetic": Masked(Absorbing(times="antithetic")),
    "independent": Masked(Absorbing(times="independent")),
    "paper": Masked(Absorbing(times="paper")),
    "count": Masked(Absorbing(mask_sampler="count")),
    "complementary": Masked(Absorbing(complementary=True), draws_per_sequence=2),
    "complementary, cosine": Masked(Absorbing(build("cosine"), complementary=True), draws_per_sequence=2),
    "T = 20000": Masked(Absorbing(num_timesteps=20_000)),
    "tauLDR, one token": TauLDR(Absorbing(), estimator="one_token"),
    "tauLDR, all masked": TauLDR(Absorbing(), estimator="all_masked"),
}


@pytest.fixture(scope="module")
def drawn():
    return {name: estimates(objective, seed) for seed, (name, objective) in enumerate(ESTIMATORS.items())}


def holm_smallest(p_values):
    """The smallest p value, corrected for their number."""
    return min(p_values) * len(p_values)


def test_every_estimator_and_schedule_gives_the_same_bound(drawn):
    """Two-sided z tests of every pair, and of each with the enumerated bound; Holm over all of them."""
    exact = exact_nelbo(TableDenoiser(), X_0)
    mean = {name: values.mean() for name, values in drawn.items()}
    variance = {name: values.var(ddof=1) / STEPS for name, values in drawn.items()}
    z = [(mean[a] - mean[b]) / math.sqrt(variance[a] + variance[b]) for a, b in itertools.combinations(drawn, 2)]
    z += [(mean[name] - exact) / math.sqrt(variance[name]) for name in drawn]
    assert holm_smallest([math.erfc(abs(value) / math.sqrt(2)) for value in z]) > 0.01
    assert max(variance.values()) < (0.05 * exact) ** 2  # the test could have seen a bias of a few per cent


def test_a_biased_estimator_would_have_been_seen(drawn):
    """The same statistic on a draw whose weights are wrong by 20 %: the test above can fail."""
    exact, values = exact_nelbo(TableDenoiser(), X_0), 1.2 * drawn["linear"]
    z = (values.mean() - exact) / math.sqrt(values.var(ddof=1) / STEPS)
    assert abs(z) > 6


def spread(objective, rows=16, length=257, steps=300):
    """Standard deviation over batches of the bound per token, for a model whose cross-entropy is 1 + 5 t^2 times a
    number of the token's own.
    """
    maskable = np.ones((rows, length), dtype=bool)
    maskable[:, 0] = False
    values = []
    for step in range(steps):
        draw = objective.draw(DrawKey(2, step, range(rows), rows), np.zeros((rows, length), dtype=np.int64), maskable)
        own = torch.from_numpy(np.random.default_rng(step).exponential(size=rows * length))
        nll = own[draw.scored] * (1 + 5 * draw.is_masked.float().mean(1)[draw.scored // length] ** 2)
        values.append((draw.weight * nll).sum().item() / draw.num_maskable)
    return np.std(values, ddof=1)


def test_variances_are_in_the_order_that_strata_promise():
    """On rows of 256 tokens.

    Strata beat independent draws, all masked tokens beat one (MD4's argument against tauLDR's estimator).
    """
    table = {
        "stratified": spread(Masked(Absorbing())),
        "antithetic": spread(Masked(Absorbing(times="antithetic"))),
        "independent": spread(Masked(Absorbing(times="independent"))),
        "count": spread(Masked(Absorbing(mask_sampler="count"))),
        "one token": spread(TauLDR(Absorbing(), estimator="one_token")),
        "all masked": spread(TauLDR(Absorbing(), estimator="all_masked")),
    }
    assert table["stratified"] < table["independent"] / 2
    assert table["antithetic"] < table["independent"] / 2
    assert table["count"] < table["stratified"]
    assert table["stratified"] < table["one token"] / 2
    assert table["stratified"] < table["all masked"] < table["one token"]


def test_no_position_of_a_row_has_a_biased_t_except_in_the_papers_order():
    """Sixteen blocks a row, 4 rows: the mean of t by block over many steps, in standard errors."""
    num_blocks, rows, steps = 16, 4, 400
    means = {}
    for mode in ("stratified", "antithetic", "independent", "paper"):
        drawn = np.stack(
            [times(mode, DrawKey(0, step, range(rows), rows), num_blocks) for step in range(steps)]
        )  # [steps, rows, blocks]
        assert drawn.min() > 0 and drawn.max() < 1
        means[mode] = drawn.mean((0, 1))
    # Rows of one antithetic batch share their u: only the steps count.
    assert all(
        np.abs(means[mode] - 0.5).max() < 4.5 * math.sqrt(1 / 12 / steps)
        for mode in ("stratified", "antithetic", "independent")
    )
    assert means["paper"][0] < 0.39 and means["paper"][-1] > 0.61
    assert (np.diff(means["paper"]) > 0).all()


def test_antithetic_times_hit_every_stratum_once_over_the_whole_global_batch():
    key = DrawKey(0, 3, range(40), 40)
    assert sorted(np.floor(times("antithetic", key)[:, 0] * 40)) == list(range(40))
    halves = [times("antithetic", DrawKey(0, 3, rows, 40)) for rows in (range(17), range(17, 40))]
    assert np.array_equal(np.concatenate(halves), times("antithetic", key))


@pytest.mark.parametrize(
    ("clip", "expected"),
    [(Clip(0.3, 0.8), "part"), (Clip(0.3, 0.8, "paper"), "mean"), (Clip(0.6, 0.9, "paper"), "flat")],
)
def test_clips_estimate_the_part_of_the_integral_that_they_say(clip, expected):
    """`unbiased`.

    The integral over [beta, omega]; `paper`: its mean over the interval, and plain cross-entropy above 0.5.
    """
    denoiser, values = TableDenoiser(), estimates(Masked(Absorbing(clip=clip)), 7)
    nodes, node_weights = np.polynomial.legendre.leggauss(40)
    total = 0.0
    for x, w in zip((nodes + 1) / 2, node_weights / 2, strict=True):
        t = clip.beta + (clip.omega - clip.beta) * x
        for pattern in itertools.product([False, True], repeat=LENGTH):
            p = math.prod(t if masked else 1 - t for masked in pattern)
            x_t = torch.where(torch.tensor([False, *pattern]), denoiser.mask_id, X_0)
            log_probs = denoiser.log_probs(x_t)
            nll = -sum(log_probs[n, X_0[n]].item() for n in range(1, 1 + LENGTH) if pattern[n - 1])
            total += w * p * nll / (1 if expected == "flat" else t)
    total *= clip.omega - clip.beta if expected == "part" else 1
    assert abs(values.mean() - total) < 4 * values.std(ddof=1) / math.sqrt(STEPS)


def test_complementary_rows_mask_exactly_what_the_other_left_clean():
    objective = Masked(Absorbing(complementary=True), draws_per_sequence=2)
    maskable = np.ones((8, 40), dtype=bool)
    maskable[:, 0] = False
    draw = objective.draw(DrawKey(0, 0, range(8), 8), None, maskable)
    assert torch.equal(draw.is_masked[0::2] ^ draw.is_masked[1::2], torch.from_numpy(maskable[0::2]))


def test_context_weights_are_carts_sum():
    """(1/2) sum over clean tokens at distance d of p (1 - p)^(d - 1), by the definition."""
    p, maskable = 0.3, np.ones((3, 30), dtype=bool)
    maskable[:, [0, 12]] = False  # two documents
    draw = Masked(Absorbing(context_weights=p)).draw(DrawKey(1, 0, range(3), 3), None, maskable)
    plain = Masked(Absorbing()).draw(DrawKey(1, 0, range(3), 3), None, maskable)
    clean = maskable & ~draw.is_masked.numpy()
    for place, weight, elbo in zip(draw.scored, draw.weight, plain.weight, strict=True):
        row, n = divmod(int(place), 30)
        document = range(1, 12) if n < 12 else range(13, 30)
        expected = 0.5 * sum(p * (1 - p) ** (abs(n - i) - 1) for i in document if i != n and clean[row, i])
        assert weight.item() == pytest.approx(elbo.item() * expected, rel=1e-5, abs=1e-7)


def genmd4_bound(denoiser, exponents):
    """The exact ELBO as a function of w [V], by quadrature and enumeration.

    Differentiable by finite differences alone.
    """
    nodes, node_weights = np.polynomial.legendre.leggauss(80)
    total = 0.0
    for x, weight in zip((nodes + 1) / 2, node_weights / 2, strict=True):
        u = T_1 ** (1 - x)  # logarithmic in t, where the powers are smooth
        dt = u * -math.log(T_1) * weight
        for pattern in itertools.product([False, True], repeat=LENGTH):
            probability, bracket = 1.0, 0.0
            x_t = torch.where(torch.tensor([False, *pattern]), denoiser.mask_id, X_0)
            mu = denoiser.log_probs(x_t).exp()
            for n in range(1, 1 + LENGTH):
                w = exponents[X_0[n]]
                probability *= u**w if pattern[n - 1] else 1 - u**w
                if pattern[n - 1]:
                    bracket += (mu[n] @ exponents - w * (1 + mu[n, X_0[n]].log())).item() / u
            total += dt * probability * bracket
    log_p = exponents * math.log(T_1)
    for n in range(1, 1 + LENGTH):
        own = log_p[X_0[n]]
        total += (own.exp() * (log_p.logsumexp(0) - own)).item()
    return total


THETA = torch.tensor([0.2, 1.1, -0.3, 0.7], dtype=torch.float64)


def test_genmd4s_loss_and_gradient_are_those_of_the_exact_bound_and_autodiff_alone_is_not():
    denoiser, pairs, steps = TableDenoiser(3), 300, 80
    objective = GenMD4(Absorbing(), VOCAB).double()
    objective.theta.data = THETA.clone()
    x_0 = X_0.repeat(2 * pairs, 1)
    maskable = np.ones(x_0.shape, dtype=bool)
    maskable[:, 0] = False
    gradients, naive, bounds = [], [], []
    for step in range(steps):
        draw = objective.draw(DrawKey(5, step, range(2 * pairs), 2 * pairs), x_0.numpy(), maskable)
        draw = type(draw)(**{**vars(draw), "t": draw.t.double(), "weight": draw.weight.double()})
        result = objective(denoiser, Batch(x_0, draw, FULL))
        bounds.append(result.by_token["bound"].item() / (2 * pairs))
        (gradient,) = torch.autograd.grad(result.weighted_sum / (2 * pairs), objective.theta)
        gradients.append(gradient.numpy())
        # Without REINFORCE: the derivative of what is averaged, with the masks as they fell.
        batch = Batch(x_0, draw, FULL)
        inside = (draw.weight * objective._integrand(denoiser, batch)[0]).sum() + (
            objective._reconstruction(x_0) * draw.maskable
        ).sum()
        naive.append(torch.autograd.grad(inside / (2 * pairs), objective.theta)[0].numpy())
    softplus = torch.nn.functional.softplus
    exact = genmd4_bound(denoiser, softplus(THETA))
    assert abs(np.mean(bounds) - exact) < 4 * np.std(bounds, ddof=1) / math.sqrt(steps)
    step = 1e-4
    finite = np.array(
        [
            (
                genmd4_bound(denoiser, softplus(THETA + step * unit))
                - genmd4_bound(denoiser, softplus(THETA - step * unit))
            )
            / (2 * step)
            for unit in torch.eye(VOCAB, dtype=torch.float64)
        ]
    )
    error = np.std(gradients, axis=0, ddof=1) / math.sqrt(steps)
    assert (np.abs(np.mean(gradients, axis=0) - finite) < 4 * error).all()
    biased = (np.mean(naive, axis=0) - finite) / (np.std(naive, axis=0, ddof=1) / math.sqrt(steps))
    assert np.abs(biased).max() > 20
    # The bias pushes every exponent of the text down: this is how naive training loses the schedule.
    assert (np.mean(naive, axis=0) > finite + 4 * error)[X_0[1:].numpy()].all()
