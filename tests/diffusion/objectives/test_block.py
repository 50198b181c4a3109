"""Block diffusion.

One pass over [x_t ; x_0] is every block on its own, K = 1 is the AR model, K = L is masked diffusion, the bound is the
enumerated one.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from dlm_ray.diffusion import clip_search, likelihood, schedules
from dlm_ray.diffusion.absorbing import Absorbing, Clip
from dlm_ray.diffusion.denoiser import Batch
from dlm_ray.diffusion.draws import DrawKey, maskable_positions
from dlm_ray.diffusion.objectives import Autoregressive, Block, Masked
from dlm_ray.diffusion.objectives.auxiliary import AuxiliaryLosses
from dlm_ray.diffusion.visibility import Visibility, annealed, documents_apart
from dlm_ray.models.attention import PreparedVisibility

FULL = Visibility("bidirectional")
VOCAB = 23
_random = np.random.default_rng(11)
_sizes = [(int(_random.integers(1, 12)), int(_random.integers(2, 9))) for _ in range(5)]  # K, and blocks of a row
SHAPES = [(24, 1), (24, 4), (24, 24), (130, 13), *((size * count, size) for size, count in _sizes)]
CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["shift", "no shift"])
def shift(request):
    return request.param


def network(shift, length=24, family="llama", double=True):
    from dlm_ray.config.recipe import Architecture
    from dlm_ray.models import families, parallel

    architecture = Architecture(
        family=family, width=32, num_layers=2, num_heads=4, max_positions=length, tie_embeddings=False
    )
    denoiser = parallel.build(families.scratch_config(architecture, VOCAB + 1, 0, 0), VOCAB, shift)
    parallel.materialize(denoiser, CPU)
    parallel.initialize(denoiser, seed=3)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.mul_(3.0)  # far enough from nothing that every token matters
    return denoiser.double() if double else denoiser


def texts(length, rows=3, documents=None):
    x_0 = torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    document_ids = np.zeros((rows, length), dtype=np.int32) if documents is None else documents
    return x_0, maskable_positions(document_ids)


def batch_of(objective, x_0, maskable, step=0, block_tokens=None, visibility=FULL):
    key = DrawKey(5, step, range(len(x_0)), len(x_0), block_tokens)
    return Batch(x_0, objective.draw(key, x_0.numpy(), maskable), visibility)


# Who sees whom


def by_definition(half, block_tokens, query, key):
    """Section 3.2 of the paper, pair by pair."""
    n, m = query % half, key % half
    b, c = n // block_tokens, m // block_tokens
    if query < half:
        return b == c if key < half else c < b
    return key >= half and c <= b


@pytest.mark.parametrize(("length", "block_tokens"), SHAPES)
def test_the_dense_mask_and_flex_attention_are_the_papers_definition(length, block_tokens):
    visibility = Visibility("bidirectional", block_tokens=block_tokens, half=length)
    dense = visibility.dense(2 * length, CPU)
    expected = [[by_definition(length, block_tokens, q, k) for k in range(2 * length)] for q in range(2 * length)]
    assert torch.equal(dense[0, 0], torch.tensor(expected))
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 2 * length, 16) for _ in range(3))
    flex = flex_attention(query, key, value, block_mask=visibility.block_mask(2 * length, CPU))
    assert torch.allclose(flex, F.scaled_dot_product_attention(query, key, value, attn_mask=dense), atol=2e-6)


def test_documents_and_annealing_stay_within_what_blocks_allow():
    documents = torch.tensor([[0] * 10 + [1] * 14], dtype=torch.int32)
    plain = Visibility("bidirectional", block_tokens=4, half=24).dense(48, CPU)
    apart = Visibility("bidirectional", block_tokens=4, half=24, document_ids=documents).dense(48, CPU)
    same = (documents[:, :, None] == documents[:, None, :]).repeat(1, 2, 2)[:, None]
    assert torch.equal(apart, plain & same)
    past = replace(annealed("window", 0.0, 0, 4, None), block_tokens=4, half=24).dense(48, CPU)
    some = replace(annealed("bernoulli", 0.5, 7, 4, None), block_tokens=4, half=24).dense(48, CPU)
    assert (past <= some).all() and (some <= plain).all() and past.sum() < some.sum() < plain.sum()
    position = torch.arange(48) % 24
    assert torch.equal(past, plain & (position[None, :] <= position[:, None]))


def test_both_halves_have_the_same_position_ids():
    assert Visibility("bidirectional", block_tokens=4, half=24).positions(48, CPU).tolist() == [
        [*range(24), *range(24)]
    ]


# One pass is every block on its own


def naive_nll(denoiser, batch, block_tokens):
    """Block after block: the clean text before it, then the noisy block, in one row of its own; rows picked by hand."""
    is_masked, x_0 = batch.draw.is_masked, batch.x_0
    x_t = torch.where(is_masked, VOCAB, x_0)
    found = torch.zeros(x_0.shape, dtype=torch.float64)
    for first in range(0, x_0.shape[1], block_tokens):
        row = torch.cat([x_0[:, :first], x_t[:, first : first + block_tokens]], 1)
        hidden = denoiser.hidden(row, Visibility("bidirectional", block_tokens=block_tokens))
        logits = denoiser.network.get_output_embeddings()(hidden)[..., :VOCAB]
        for n in range(first, row.shape[1]):
            if n or not denoiser.shift:
                found[:, n] = F.cross_entropy(logits[:, n - denoiser.shift], x_0[:, n], reduction="none")
    return found[is_masked]


@torch.no_grad()
@pytest.mark.parametrize(("length", "block_tokens"), SHAPES)
def test_one_pass_two_passes_and_a_forward_per_block_say_the_same(length, block_tokens, shift):
    denoiser = network(shift, length)
    x_0, maskable = texts(length)
    one, two = (Block(block_tokens=block_tokens, passes=passes) for passes in ("one", "two"))
    batch = batch_of(one, x_0, maskable)
    expected = naive_nll(denoiser, batch, block_tokens)
    order = batch.draw.scored[: batch.draw.num_scored].argsort()
    for objective in (one, two):
        nll = objective.token_nll(denoiser, batch)[: batch.draw.num_scored]
        assert torch.allclose(
            nll[order].double(), expected, atol=1e-5
        )  # the norms of these networks compute in float32
    if block_tokens < length and not (block_tokens == 1 and shift):
        assert torch.allclose(
            one.nll_of_draws(denoiser, batch, [batch.draw])[0], one.token_nll(denoiser, batch), atol=1e-5
        )


@torch.no_grad()
def test_a_later_clean_token_changes_no_earlier_prediction(shift):
    denoiser, block_tokens = network(shift), 4
    x_0, maskable = texts(24)
    objective = Block(block_tokens=block_tokens)
    batch = batch_of(objective, x_0, maskable)
    other = batch.x_0.clone()
    other[:, 16:] = (other[:, 16:] % (VOCAB - 1)) + 1
    scored = batch.draw.scored % 24
    before = objective.token_nll(denoiser, batch)
    after = objective.token_nll(denoiser, replace(batch, x_0=other))
    assert torch.equal(before[scored < 16], after[scored < 16])
    assert not torch.equal(before[scored >= 16], after[scored >= 16])


def test_two_passes_have_the_gradient_of_one(shift):
    x_0, maskable = texts(24)
    gradients = []
    for passes in ("one", "two"):
        denoiser = network(shift)
        objective = Block(block_tokens=4, passes=passes)
        objective(denoiser, batch_of(objective, x_0, maskable)).weighted_sum.backward()
        gradients.append([parameter.grad for parameter in denoiser.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5)


# The ends


def test_blocks_of_one_with_shift_and_everything_masked_are_the_ar_model():
    x_0, maskable = texts(24)
    block, ar = Block(Absorbing(mask_sampler="count"), block_tokens=1), Autoregressive()
    values, gradients = [], []
    for objective, visibility in ((block, FULL), (ar, Visibility("causal"))):
        denoiser = network(True, double=False)
        loss = objective(denoiser, batch_of(objective, x_0, maskable, visibility=visibility)).weighted_sum
        loss.backward()
        values.append(loss.detach())
        gradients.append([parameter.grad for parameter in denoiser.parameters()])
    assert torch.equal(*values)
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert block.likelihood == "exact" and Block(block_tokens=2).likelihood == "bound"
    draw = block.evaluation_draw(0, [(0, 0)], np.array([0.3]), x_0.numpy()[:1], maskable[:1])
    assert torch.equal(draw.is_masked, torch.from_numpy(maskable[:1])) and (draw.weight[: draw.num_scored] == 1).all()


def test_one_block_is_masked_diffusion_and_costs_no_clean_half(shift):
    x_0, maskable = texts(24)
    denoiser = network(shift)
    lengths = []
    hidden = denoiser.hidden
    denoiser.hidden = lambda inputs, *rest: (lengths.append(inputs.shape[1]), hidden(inputs, *rest))[1]
    batch = batch_of(Masked(), x_0, maskable)
    assert torch.equal(Block(block_tokens=24)(denoiser, batch).weighted_sum, Masked()(denoiser, batch).weighted_sum)
    assert lengths == [24, 24]
    own = Block(block_tokens=24)
    assert torch.equal(own.draw(DrawKey(5, 0, range(3), 3), x_0.numpy(), maskable).is_masked, batch.draw.is_masked)


def test_training_on_noisy_context_is_another_loss_and_the_same_bound(shift):
    x_0, maskable = texts(24)
    denoiser = network(shift)
    clean, noisy = Block(block_tokens=4), Block(block_tokens=4, context="noisy")
    batch = batch_of(clean, x_0, maskable)
    assert not torch.isclose(clean(denoiser, batch).weighted_sum, noisy(denoiser, batch).weighted_sum)
    assert torch.equal(clean.token_nll(denoiser, batch), noisy.token_nll(denoiser, batch))


# A causal clean half: the context keeps the attention of the AR base


def causal_context(**options):
    return Block(Absorbing(mask_sampler="count"), block_tokens=4, context="clean_causal", **options)


@torch.no_grad()
def test_with_a_causal_context_the_first_position_of_a_block_is_predicted_as_the_ar_model_predicts_it():
    denoiser, (x_0, maskable) = network(True), texts(24)
    objective = causal_context()
    batch = batch_of(objective, x_0, maskable)
    scored = batch.draw.scored[: batch.draw.num_scored]
    logits = denoiser.network(x_0, attention_mask=None, visibility=PreparedVisibility("sdpa", is_causal=True)).logits[
        ..., :VOCAB
    ]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), x_0[:, 1:].flatten(), reduction="none").view(3, 23)
    expected = F.pad(expected, (1, 0)).flatten()[scored]
    is_first = scored % 4 == 0
    nll = objective.token_nll(denoiser, batch)[: len(scored)].double()
    assert torch.allclose(nll[is_first], expected[is_first], atol=1e-5)
    assert not torch.allclose(nll[~is_first], expected[~is_first], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("passes", ["one", "two"])
def test_with_a_causal_context_the_pass_over_both_halves_is_a_causal_pass_and_a_pass_per_block(passes, shift):
    denoiser, (x_0, maskable) = network(shift), texts(24)
    objective = causal_context(passes=passes)
    batch = batch_of(objective, x_0, maskable)
    x_t = torch.where(batch.draw.is_masked, VOCAB, x_0)
    rows = torch.arange(48)
    expected = torch.zeros(x_0.shape, dtype=torch.float64)
    for first in range(0, 24, 4):  # a clean causal past, then a block that sees itself: one dense mask per block
        seen = (rows[None, :] <= rows[:, None]) | ((rows[:, None] >= first) & (rows[None, :] < first + 4))
        sequence = torch.cat([x_0[:, :first], x_t[:, first : first + 4]], 1)
        length = first + 4
        prepared = PreparedVisibility("sdpa", mask=seen[None, None, :length, :length])
        logits = denoiser.network(sequence, visibility=prepared).logits[..., :VOCAB]
        for n in range(first, length):
            if n or not shift:
                expected[:, n] = F.cross_entropy(logits[:, n - shift], x_0[:, n], reduction="none")
    nll = objective.token_nll(denoiser, batch)[: batch.draw.num_scored]
    order = batch.draw.scored[: batch.draw.num_scored].argsort()
    assert torch.allclose(nll[order].double(), expected[batch.draw.is_masked], atol=1e-5)
    if passes == "one":
        assert torch.allclose(objective.nll_of_draws(denoiser, batch, [batch.draw])[0][: len(nll)], nll, atol=1e-5)


def test_with_a_causal_context_the_ar_loss_needs_no_pass_of_its_own():
    x_0, maskable = texts(24)
    terms = AuxiliaryLosses(autoregressive_weight=0.5)
    found = {}
    for context in ("clean", "clean_causal"):
        denoiser = network(True)
        objective = Block(Absorbing(mask_sampler="count"), block_tokens=4, context=context, auxiliary=terms)
        batch = batch_of(objective, x_0, maskable)
        lengths = []
        hidden = denoiser.hidden
        denoiser.hidden = lambda inputs, *rest, run=hidden, seen=lengths: (
            seen.append(inputs.shape[1]),
            run(inputs, *rest),
        )[1]
        loss = objective(denoiser, batch).over_tokens["autoregressive"]
        loss.backward()
        found[context] = lengths, loss.detach(), [parameter.grad for parameter in denoiser.parameters()]
    assert found["clean"][0] == [48, 24] and found["clean_causal"][0] == [48]
    assert torch.allclose(found["clean"][1], found["clean_causal"][1], rtol=1e-6)
    for one, other in zip(found["clean"][2], found["clean_causal"][2], strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


# The bound


@torch.no_grad()
def enumerated_bound(denoiser, x_0, maskable, block_tokens):
    """sum_b sum_{S in b} 1 / (k C(N_b, k)) * cross-entropy on S: t integrated out, every set of masks visited."""
    total, length = 0.0, x_0.shape[1]
    for first in range(0, length, block_tokens):
        open_positions = [n for n in range(first, first + block_tokens) if maskable[0, n]]
        for k in range(1, len(open_positions) + 1):
            for chosen in itertools.combinations(open_positions, k):
                row = x_0[:, : first + block_tokens].clone()
                row[:, list(chosen)] = VOCAB
                hidden = denoiser.hidden(row, Visibility("bidirectional", block_tokens=block_tokens))
                logits = denoiser.network.get_output_embeddings()(hidden)[0, :, :VOCAB]
                cross_entropy = sum(F.cross_entropy(logits[n - denoiser.shift], x_0[0, n]).item() for n in chosen)
                total += cross_entropy / (k * math.comb(len(open_positions), k))
    return total


@torch.no_grad()
@pytest.mark.parametrize(
    "process",
    [
        Absorbing(mask_sampler="count"),
        *(Absorbing(schedules.build(name)) for name in ("linear", "cosine", "log", "square", "square_root")),
    ],
    ids=["count", "linear", "cosine", "log", "square", "square_root"],
)
def test_every_estimator_is_the_enumerated_bound(process, shift):
    denoiser = network(shift, 8)
    x_0, maskable = texts(8, rows=1)
    exact = enumerated_bound(denoiser, x_0, maskable, 4)
    num_rows, estimates = 64, []
    objective = Block(process, block_tokens=4)
    for step in range(25):
        batch = batch_of(objective, x_0.expand(num_rows, -1), maskable.repeat(num_rows, 0), step)
        estimates.append(objective(denoiser, batch).weighted_sum.item() / num_rows)
    error = np.std(estimates, ddof=1) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - exact) < 4 * error
    assert error < 0.05 * exact


@torch.no_grad()
def test_the_reported_bound_is_the_enumerated_one_whatever_was_clipped(shift):
    from dlm_ray.diffusion.likelihood import token_nats

    denoiser = network(shift, 8)
    x_0, maskable = texts(8, rows=1)
    exact = enumerated_bound(denoiser, x_0, maskable, 4)
    objective = Block(Absorbing(clip=Clip(0.45, 0.95, enforce="counts")), block_tokens=4)
    scored = token_nats(
        denoiser,
        objective,
        x_0.repeat(8, 1).numpy(),
        np.zeros((8, 8), dtype=np.int32),
        lambda ids: FULL,
        CPU,
        num_draws=64,
        micro_batch_size=64,
    )
    spread = scored.draw_totals.std(ddof=1) / math.sqrt(64)
    assert abs(scored.nats.sum() - 8 * exact) < 4 * spread + 1e-6


# Draws


def test_every_block_has_its_own_time_and_no_block_a_biased_one():
    maskable = np.ones((4, 64), dtype=bool)
    objective = Block(block_tokens=8)
    t = np.concatenate(
        [objective.draw(DrawKey(0, step, range(4), 4), maskable, maskable).t.numpy() for step in range(300)]
    )
    assert t.shape == (1200, 8)
    assert (abs(t.mean(0) - 0.5) < 4.5 * math.sqrt(1 / 12 / 1200)).all()
    assert len(np.unique(t)) > 0.99 * t.size
    draw = objective.draw(DrawKey(0, 0, range(4), 4), maskable, maskable)
    assert torch.equal(draw.t_scored, draw.t.flatten()[draw.scored // 8])


def test_evaluation_draws_are_strata_in_every_block():
    maskable = np.ones((1, 64), dtype=bool)
    strata = (np.arange(16) + 0.5) / 16
    keys = [(number, 0) for number in range(16)]
    draw = Block(block_tokens=8).evaluation_draw(0, keys, strata, np.zeros((16, 64)), maskable.repeat(16, 0))
    assert (np.sort(np.floor(draw.t.numpy() * 16), 0) == np.arange(16)[:, None]).all()
    # 16 strata over counts 1..8: every count twice, in every block.
    counts = draw.is_masked.view(16, 8, 8).sum(2)
    assert (counts.sort(0).values == torch.arange(1, 9).repeat_interleave(2)[:, None]).all()


@pytest.mark.parametrize(("block_tokens", "beta", "omega"), [(4, 0.45, 0.95), (16, 0.3, 0.8), (4, 0.001, 0.5)])
def test_enforced_counts_have_the_law_of_the_rejection_loop(block_tokens, beta, omega):
    """BD3-LM draws t once and masks again until the masked share of the block is within the clip."""
    clip = Clip(beta, omega, enforce="counts")
    maskable = np.ones((500, block_tokens), dtype=bool)
    process, observed = Absorbing(clip=clip, times="independent"), np.zeros(block_tokens + 1)
    for step in range(20):
        draw = process.draw(DrawKey(1, step, range(500), 500, block_tokens), maskable)
        observed += np.bincount(draw.is_masked.sum(1).numpy(), minlength=block_tokens + 1)
        assert torch.allclose(draw.weight[: draw.num_scored], (omega - beta) / draw.t_scored[: draw.num_scored])
    k = np.arange(block_tokens + 1)
    inside = (k >= (0 if beta <= 1e-3 else beta * block_tokens)) & (k <= omega * block_tokens)
    p = beta + (omega - beta) * (np.arange(4000) + 0.5)[:, None] / 4000
    mass = np.array([math.comb(block_tokens, int(n)) for n in k]) * p**k * (1 - p) ** (block_tokens - k) * inside
    expected = (mass / mass.sum(1, keepdims=True)).mean(0) * observed.sum()
    assert observed[~inside].sum() == 0
    chi2 = ((observed - expected)[inside] ** 2 / expected[inside]).sum()
    degrees = inside.sum() - 1
    assert chi2 < degrees + 4.5 * math.sqrt(2 * degrees)


def test_enforced_counts_pick_no_position_more_often_and_survive_short_blocks():
    clip = Clip(0.45, 0.95, enforce="counts")
    maskable = np.ones((400, 8), dtype=bool)
    maskable[:, 0] = False  # the start token's block has one less
    maskable[:, 5:] = False  # and the end of the text leaves one token of the second
    total = np.zeros(8)
    for step in range(10):
        draw = Absorbing(clip=clip).draw(DrawKey(2, step, range(400), 400, 4), maskable)
        total += draw.is_masked.sum(0).numpy()
    assert total[0] == 0 and (total[5:] == 0).all()
    assert total[4] == 4000  # of one token, either none or all: the nearest to the interval
    assert abs(total[1:4] / total[1:4].mean() - 1).max() < 4.5 * math.sqrt(1 / total[1:4].mean())


# Texts that are not whole blocks


@torch.no_grad()
@pytest.mark.parametrize("block_tokens", [1, 4, 8])
def test_a_text_of_any_length_has_the_bound_of_its_own_tokens_however_much_padding_stands_behind_it(
    shift, block_tokens
):
    most = 2 * block_tokens + 1
    denoiser, objective = network(shift, most + 3 * block_tokens), Block(block_tokens=block_tokens)
    whole, _ = texts(most + 1, rows=2)
    for length in range(2, most + 1):
        x_0, document_ids = whole[:, :length].numpy(), np.zeros((2, length), dtype=np.int64)
        shares = {"visibility_of": lambda ids: FULL, "device": CPU, "seed": 3}
        scored = likelihood.token_nats(denoiser, objective, x_0, document_ids, num_draws=5, **shares)
        assert scored.nats.shape == x_0.shape
        # Draw by draw and block by block, with nothing behind the text.
        padded = likelihood.pad_to_blocks(objective, x_0, document_ids)
        times = likelihood.evaluation_times(3, range(2), 5)
        by_hand = np.zeros(x_0.shape)
        num_draws = len(scored.draw_totals)
        for number in range(num_draws):
            pairs = [(0, number), (1, number)]
            draw = likelihood.evaluation_batch(objective, *padded, pairs, times, 3, lambda ids: FULL, CPU).draw
            is_masked = draw.is_masked[:, :length]
            assert int(is_masked.sum()) == draw.num_scored  # padding is never scored
            own = Batch(whole[:, :length], replace(draw, is_masked=is_masked), FULL)
            by_hand[is_masked.numpy()] += (
                naive_nll(denoiser, own, block_tokens) * draw.weight[: draw.num_scored]
            ).numpy() / num_draws
        assert np.allclose(scored.nats, by_hand, rtol=1e-6)  # weights are float32
        for more in (1, 2):
            width = ((0, 0), (0, more * block_tokens))
            longer = [np.pad(padded[0], width, constant_values=7), np.pad(padded[1], width, constant_values=-1)]
            visible = {
                **shares,
                "visibility_of": lambda ids: Visibility("bidirectional", document_ids=documents_apart(ids, True, CPU)),
            }
            again = likelihood.token_nats(denoiser, objective, *longer, num_draws=5, **visible)
            assert np.allclose(again.nats[:, :length], scored.nats, rtol=1e-9) and not again.nats[:, length:].any()


def test_an_objective_of_blocks_refuses_rows_that_are_not_whole_blocks():
    maskable = np.ones((1, 10), dtype=bool)
    objective = Block(block_tokens=8)
    with pytest.raises(ValueError, match="of 10 positions are not a whole number of blocks of 8; pad them to 16"):
        objective.evaluation_draw(0, [(0, 0)], np.array([0.5]), np.zeros((1, 10)), maskable)
    with pytest.raises(ValueError, match="of 10 positions are not a whole number of blocks of 4; pad them to 12"):
        objective.draw(DrawKey(0, 0, [0], 1, block_tokens=4), np.zeros((1, 10)), maskable)


# The clip search


def test_the_papers_candidates():
    found = clip_search.candidates()
    assert len(found) == 36
    intervals = {(clip.beta, clip.omega) for clip in found}
    assert {(1e-3, 1.0), (0.3, 0.8), (0.45, 0.95), (1e-3, 0.5), (0.5, 1.0), (0.1, 1.0)} <= intervals
    assert all(clip.weight == "paper" for clip in found)
    for clip in found:
        size = np.array([2, 3, 4, 16])
        least, most = clip.counts(size)
        assert (least / size >= clip.beta - 1e-3 - 1e-9).all() and (most / size <= clip.omega + 1e-9).all()


@torch.no_grad()
def test_the_search_shares_one_clean_pass_and_its_statistic_is_the_papers():
    denoiser = network(True)
    x_0, _ = texts(24, rows=6)
    document_ids = np.zeros((6, 24), dtype=np.int32)
    objective = Block(block_tokens=4)
    clips = [Clip(1e-3, 1.0, "paper"), Clip(0.3, 0.8, "paper"), Clip(0.5, 1.0, "paper")]
    passes = []
    hidden = denoiser.hidden
    denoiser.hidden = lambda inputs, *rest: (passes.append(bool((inputs == VOCAB).any())), hidden(inputs, *rest))[1]
    share = {"num_draws": 3, "seed": 4, "micro_batch_size": 18}

    def run(**ranks):
        return clip_search.clip_sums(
            lambda batch, draws: objective.nll_of_draws(denoiser, batch, draws),
            objective, clips, x_0.numpy(), document_ids, lambda ids: FULL, CPU, **share, **ranks,
        )  # fmt: skip

    totals = run()
    assert passes == [False, True, True, True]
    split = run(rank=0, world_size=2) + run(rank=1, world_size=2)
    assert torch.allclose(totals, split)
    found = {(one.beta, one.omega): one for one in clip_search.clip_statistics(clips, totals)}
    for clip in clips:
        own = Block(Absorbing(clip=clip), block_tokens=4)
        key = DrawKey(4, 0, range(18), 18)
        rows = x_0.repeat(3, 1)
        maskable = maskable_positions(document_ids).repeat(3, 0).reshape(18, 24)
        maskable = np.tile(maskable_positions(document_ids), (3, 1))
        batch = Batch(rows, own.draw(key, rows.numpy(), maskable), FULL)
        by_token = torch.zeros(18 * 24, dtype=torch.float64)
        real = slice(0, batch.draw.num_scored)
        by_token[batch.draw.scored[real]] = (own.token_nll(denoiser, batch) / batch.draw.t_scored)[real].double()
        block_means = by_token.view(-1, 4).mean(1)
        one = found[clip.beta, clip.omega]
        assert one.variance == pytest.approx(block_means.var().item(), rel=1e-5)
        assert one.mean == pytest.approx(block_means.mean().item(), rel=1e-5)
        assert one.masked_tokens == pytest.approx(batch.draw.num_scored / (18 * 6))
