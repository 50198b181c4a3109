"""Padding is without effect: of scored positions (weight 0 times anything is 0) and of rows (text does not see it)."""

import numpy as np
import pytest
import torch

from dlm_ray.config.recipe import Architecture
from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.denoiser import Batch
from dlm_ray.diffusion.draws import DrawKey, maskable_positions
from dlm_ray.diffusion.likelihood import token_nats
from dlm_ray.diffusion.objectives import Autoregressive, Block, D3pm, GenMD4, Masked, Sedd, SsdLm, TauLDR
from dlm_ray.diffusion.objectives.auxiliary import AuxiliaryLosses
from dlm_ray.diffusion.visibility import Visibility, documents_apart
from dlm_ray.models import families, parallel

VOCAB, LENGTH, MASK, CPU = 20, 24, 7, torch.device("cpu")


def network(shift=False):
    """Its mask token is one of the vocabulary, whose logit is -inf."""
    architecture = Architecture(
        family="llama", width=16, num_layers=2, num_heads=2, max_positions=2 * LENGTH, tie_embeddings=False
    )
    denoiser = parallel.build(families.scratch_config(architecture, VOCAB, 0, 0), MASK, shift)
    parallel.materialize(denoiser, CPU)
    parallel.initialize(denoiser, seed=3)
    return denoiser


def texts(rows=2, length=LENGTH):
    x_0 = torch.randint(8, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))
    return x_0, np.zeros((rows, length), dtype=np.int32)


def teacher(x_0, visibility):
    return tuple(torch.ones(*x_0.shape, 16) for _ in range(3))


OBJECTIVES = {
    "autoregressive": Autoregressive,
    "masked": Masked,
    "terms": lambda: Masked(auxiliary=AuxiliaryLosses(confidence_weight=0.5, autoregressive_weight=0.2)),
    "alignment": lambda: Masked(auxiliary=AuxiliaryLosses(alignment_weight=1.0, teacher=teacher)),
    "block": lambda: Block(block_tokens=8),
    "sedd": lambda: Sedd(vocab_size=VOCAB),
    "genmd4": lambda: GenMD4(Absorbing(), VOCAB),
    "d3pm": lambda: D3pm(Absorbing(num_timesteps=10)),
    "tauldr": lambda: TauLDR(Absorbing(), estimator="all_masked"),
    "ssd_lm": lambda: SsdLm(VOCAB, 16, block_tokens=4),
}


def with_broken_context(denoiser):
    """The network with hidden states that are NaN at position 1, which in the tests below is a start token of its own
    document.
    """
    hidden, states = denoiser.hidden, denoiser.states

    def broken(found):
        is_broken = (torch.arange(found.shape[1]) % LENGTH == 1)[None, :, None]
        return torch.where(is_broken, torch.nan, found)

    denoiser.hidden = lambda *arguments: broken(hidden(*arguments))
    denoiser.states = lambda *arguments: tuple(broken(one) for one in states(*arguments))
    return denoiser


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_padding_points_at_adds_neither_nan_nor_inf_to_loss_and_gradients(name):
    """Padding points at position 1: here the mask token, which has no probability, predicted from a row of NaN."""
    x_0, document_ids = texts()
    document_ids[:, 1:] = 1
    x_0[:, 1] = MASK
    maskable = maskable_positions(document_ids)
    results = []
    for denoiser in (network(), with_broken_context(network())):
        objective = OBJECTIVES[name]()
        rows = np.arange(len(x_0))
        draw = objective.draw(DrawKey(5, 0, rows, len(x_0)), x_0.numpy(), maskable)
        assert draw.num_scored < len(draw.scored)
        visibility = Visibility(
            "causal" if objective.is_causal else "bidirectional", document_ids=torch.from_numpy(document_ids)
        )
        batch = Batch(x_0, draw, visibility)
        loss = objective(denoiser, batch)
        total = loss.total(objective.count(draw), draw.num_maskable)
        total.backward()
        assert all(torch.isfinite(value) for value in (*loss.by_name.values(), *loss.by_token.values()))
        assert torch.isfinite(objective.token_nll(denoiser, batch)).all()
        parameters = [*denoiser.parameters(), *objective.parameters()]
        results.append([total.detach(), *(p.grad for p in parameters if p.grad is not None)])
    assert all(torch.isfinite(value).all() for value in results[0])
    assert torch.equal(results[0][0], results[1][0])


@pytest.mark.parametrize("shift", [True, False], ids=["shift", "no shift"])
@pytest.mark.parametrize("length", range(2, 18))
def test_rows_that_are_not_whole_blocks_are_padded_and_the_text_does_not_see_it(length, shift):
    """Blocks of 8 stay blocks of 8.

    What a row begins with has the same nats as in a longer row, and what the padding holds is without effect.
    """
    denoiser, objective = network(shift), Block(block_tokens=8)
    x_0, document_ids = texts(3)

    def nats(ids, documents):
        visible = lambda ids: Visibility("bidirectional", document_ids=documents_apart(ids, False, CPU))  # noqa: E731
        return token_nats(denoiser, objective, ids.numpy(), documents, visible, CPU, num_draws=2).nats

    short = nats(x_0[:, :length], document_ids[:, :length])
    assert short.shape == (3, length)
    own_padding, documents = x_0.clone(), document_ids.copy()
    documents[:, length:] = -1
    assert np.allclose(short, nats(own_padding, documents)[:, :length], rtol=1e-5)
    whole = length // 8 * 8
    assert np.allclose(short[:, :whole], nats(x_0, document_ids)[:, :whole], rtol=1e-5)


def test_padding_is_hidden_even_if_the_caller_keeps_nothing_apart():
    denoiser, objective = network(), Block(block_tokens=8)
    x_0, document_ids = texts(3, 11)
    arguments = (denoiser, objective, x_0.numpy(), document_ids)
    found = [
        token_nats(*arguments, visible, CPU, num_draws=2).nats
        for visible in (
            lambda ids: Visibility("bidirectional"),
            lambda ids: Visibility("bidirectional", document_ids=documents_apart(ids, True, CPU)),
        )
    ]
    assert np.allclose(*found, rtol=1e-6)
