"""SSD-LM: the simplex, its noise, what the block may see, and decoding against the exact law of a toy."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.laws import chi_square_z, tally

from dlm_ray.diffusion.denoiser import Batch
from dlm_ray.diffusion.draws import DrawKey
from dlm_ray.diffusion.objectives.ssd_lm import SsdLm, alpha_bar
from dlm_ray.diffusion.samplers.rules import Canvas
from dlm_ray.diffusion.samplers.simplex import project, sample_blocks, steered
from dlm_ray.diffusion.visibility import Visibility

VOCAB, WIDTH, ROW, BLOCK = 4, 6, 9, 2


class Toy(torch.nn.Module):
    """Attends as the visibility says, with one causal-free mixing layer: the mean of what is seen, then a table."""

    mask_id = None

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCAB, WIDTH, generator=generator)
        self.head = torch.randn(WIDTH, VOCAB, generator=generator)

    def embed(self, ids):
        return self.table[ids]

    def hidden(self, inputs, visibility):
        sees = visibility.dense(inputs.shape[1], inputs.device).float()[:, 0]  # [B or 1, L, L]
        return sees @ inputs / sees.sum(-1, keepdim=True) + 0.3 * torch.arange(inputs.shape[1])[None, :, None]

    def reduce_logits(self, rows, fn, *arguments):
        return fn(rows @ self.head, *arguments)

    def rows_for(self, positions):
        return positions


@pytest.fixture
def objective():
    made = SsdLm(VOCAB, WIDTH, block_tokens=BLOCK, num_timesteps=100)
    torch.nn.init.normal_(made.diffusion_embedding, generator=torch.Generator().manual_seed(1))
    return made


def batch_of(objective, x_0, rows=6, step=0, documents=None):
    maskable = np.ones((rows, ROW), dtype=bool)
    maskable[:, 0] = False
    draw = objective.draw(DrawKey(3, step, range(rows), rows), x_0.numpy(), maskable)
    return Batch(x_0, draw, Visibility("bidirectional", document_ids=documents))


def test_the_block_attends_as_far_as_annealing_has_come(objective):
    """What lies behind the block is hidden in any case.

    Before it, the future is seen as the batch's visibility says.
    """
    x_0 = torch.randint(0, VOCAB, (6, ROW), generator=torch.Generator().manual_seed(5))
    batch, seen = batch_of(objective, x_0), []
    toy = Toy()
    attend = toy.hidden
    toy.hidden = lambda inputs, visibility: seen.append(visibility) or attend(inputs, visibility)
    nll = {
        pattern: objective.token_nll(
            toy, replace(batch, visibility=Visibility(pattern, hash_limit=1, window_tokens=1))
        ).tolist()
        for pattern in ("causal", "window", "bidirectional")
    }
    assert [visibility.pattern for visibility in seen] == list(nll)
    # A window of one position covers all of a block of two.
    assert nll["causal"] != nll["window"] == nll["bidirectional"]
    for visibility, reach in zip(seen, (0, 1, ROW), strict=True):
        sees = visibility.dense(ROW, x_0.device)[:, 0]
        for row, first in enumerate(batch.draw.is_masked.int().argmax(1).tolist()):
            for n, m in itertools.product(range(first + BLOCK), range(ROW)):
                assert bool(sees[row, n, m]) == (m <= n + reach and m < first + BLOCK)


def test_the_signal_is_all_there_at_0_and_gone_at_1():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert alpha_bar(t)[0] == 1 and alpha_bar(t)[2] < 1e-12
    assert alpha_bar(t)[1].item() == pytest.approx(math.cos((0.5 + 1e-4) / (1 + 1e-4) * math.pi / 2) ** 2, rel=1e-6)
    assert (alpha_bar(torch.linspace(0, 1, 50)).diff() < 0).all()


def test_a_token_is_a_corner_and_its_noise_has_the_variance_of_the_paper(objective):
    tokens, t = torch.tensor([[2, 0]]).repeat(4000, 1), torch.full((4000,), 0.6)
    noise = torch.randn(4000, BLOCK, VOCAB, generator=torch.Generator().manual_seed(2))
    w_t = objective.noised(tokens, t, noise)
    signal = alpha_bar(torch.tensor(0.6)).item()
    expected = math.sqrt(signal) * torch.tensor([[-5.0, -5, 5, -5], [5, -5, -5, -5]])
    assert torch.allclose(w_t.mean(0), expected, atol=0.35)
    assert w_t.std(0).mean().item() == pytest.approx(5 * math.sqrt(1 - signal), rel=0.02)


def test_nothing_behind_the_block_is_seen_and_everything_before_it_is(objective):
    x_0 = torch.randint(0, VOCAB, (6, ROW), generator=torch.Generator().manual_seed(4))
    batch, toy = batch_of(objective, x_0), Toy()
    start = batch.draw.is_masked.int().argmax(1)
    nll = objective.token_nll(toy, batch)[: batch.draw.num_scored]
    for change, matters in ((1, True), (-1, False)):  # a token before the block, a token behind it
        for row in range(6):
            place = int(start[row]) - 1 if change == 1 else int(start[row]) + BLOCK
            if not 0 <= place < ROW:
                continue
            other = x_0.clone()
            other[row, place] = (other[row, place] + 1) % VOCAB
            changed = objective.token_nll(toy, Batch(other, batch.draw, batch.visibility))[: batch.draw.num_scored]
            of_row = batch.draw.scored[: batch.draw.num_scored] // ROW == row
            assert bool((changed[of_row] != nll[of_row]).any()) == matters
            assert torch.equal(changed[~of_row], nll[~of_row])


def test_every_context_length_comes_and_the_noise_is_the_rows_own(objective):
    x_0 = torch.zeros(6, ROW, dtype=torch.long)
    draws = [batch_of(objective, x_0, step=step).draw for step in range(60)]
    assert {int(s) for draw in draws for s in draw.is_masked.int().argmax(1)} == set(range(1, ROW - BLOCK + 1))
    maskable = np.ones((2, ROW), dtype=bool)
    part = objective.draw(DrawKey(3, 0, [4, 5], 6), x_0[:2].numpy(), maskable)
    assert part.noise_seeds == draws[0].noise_seeds[4:]
    assert torch.equal(objective.noise(7, torch.device("cpu")), objective.noise(7, torch.device("cpu")))


def canvas_of(num_rows, context, total):
    ids = torch.zeros(num_rows, total, dtype=torch.long)
    is_masked = torch.zeros(num_rows, total, dtype=torch.bool)
    is_masked[:, context:] = True
    return Canvas(ids, is_masked)


def test_one_step_of_sampled_decoding_has_the_exact_law():
    """With W_diff = 0 the network sees no noise.

    The block's tokens are independent, with the softmax of their logits.
    """
    objective, toy, num_samples = SsdLm(VOCAB, WIDTH, block_tokens=BLOCK), Toy(), 20_000
    done = sample_blocks(toy, objective, canvas_of(num_samples, 3, 5), num_steps=3, projection="sampled", seed=1)
    inputs = torch.cat([toy.embed(torch.zeros(1, 3, dtype=torch.long)), torch.zeros(1, BLOCK, WIDTH)], 1)
    p = (toy.hidden(inputs, Visibility("bidirectional")) @ toy.head)[0, 3:].double().softmax(-1)
    exact = {(0, 0, 0, a, b): float(p[0, a] * p[1, b]) for a in range(VOCAB) for b in range(VOCAB)}
    assert abs(chi_square_z(tally(done.ids), exact, num_samples)) < 4


def test_blocks_times_steps_is_what_decoding_costs_and_the_context_stays(objective):
    canvas = canvas_of(3, 2, 9)  # 7 tokens: 3 whole blocks and half of one
    canvas.ids[:, :2] = torch.tensor([3, 1])
    done = sample_blocks(Toy(), objective, canvas, num_steps=5, projection="greedy", seed=0)
    assert done.num_network_calls == 4 * 5
    assert (done.ids[:, :2] == torch.tensor([3, 1])).all()
    alone = sample_blocks(Toy(), objective, canvas_of(1, 2, 9), num_steps=5, seed=0)
    company = sample_blocks(Toy(), objective, canvas_of(5, 2, 9), num_steps=5, seed=0)
    assert torch.equal(alone.ids[0], company.ids[0])


def test_projections_take_the_best_a_drawn_one_or_the_whole_nucleus(objective):
    logits = torch.tensor([[[3.0, 1.0, 2.9, -5.0], [0.0, 0.0, 0.0, 9.0]]])
    uniform = torch.full((1, BLOCK), 0.6, dtype=torch.float64)
    tokens, corner = project(objective, logits, "greedy", uniform)
    assert tokens.tolist() == [[0, 3]] and corner[0, 0].tolist() == [5, -5, -5, -5]
    tokens, corner = project(objective, logits, "sampled", uniform)
    assert tokens.tolist() == [[2, 3]] and corner[0, 0].tolist() == [-5, -5, 5, -5]
    tokens, corner = project(objective, logits, "multi_hot", uniform, top_p=0.9)
    assert (
        tokens.tolist() == [[0, 3]]
        and corner[0, 0].tolist() == [5, -5, 5, -5]
        and corner[0, 1].tolist() == [-5, -5, -5, 5]
    )


def test_control_moves_the_logits_along_the_classifiers_gradient_and_the_text_follows(objective):
    def likes_word_2(probs):
        return probs[..., 2].clamp(min=1e-9).log().sum(-1)

    logits = torch.randn(2, BLOCK, VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = steered(logits, likes_word_2, 2.0)
    expected = logits + 2.0 * (torch.eye(VOCAB, dtype=torch.float64)[2] - logits.softmax(-1))  # d log p_2 / d logits
    assert torch.allclose(moved, expected)
    canvas = canvas_of(200, 2, 6)
    free = sample_blocks(Toy(), objective, canvas, num_steps=4, seed=0).ids[:, 2:]
    steered_to = sample_blocks(
        Toy(), objective, canvas, num_steps=4, control=likes_word_2, control_weight=20.0, seed=0
    ).ids[:, 2:]
    assert (steered_to == 2).float().mean() > (free == 2).float().mean() + 0.3
