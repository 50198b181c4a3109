"""Checks of every supported family: leaks, causal logits, meta build, export, and the base model's loss."""

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import LENGTH, VOCAB, architecture, build, stock

from dlm_ray.config.errors import UserError
from dlm_ray.config.recipe import FAMILIES
from dlm_ray.diffusion.denoiser import Batch
from dlm_ray.diffusion.draws import maskable_positions
from dlm_ray.diffusion.objectives import Autoregressive
from dlm_ray.diffusion.objectives.autoregressive import exact_draw
from dlm_ray.diffusion.visibility import Visibility, annealed
from dlm_ray.models import families, parallel
from dlm_ray.models.denoiser import HuggingFaceDenoiser


def logits(denoiser, ids, visibility):
    return denoiser.network.get_output_embeddings()(denoiser.hidden(ids, visibility))


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def ids():
    return torch.randint(1, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_position_0_sees_the_last_position_only_if_the_visibility_allows_it(family, ids):
    denoiser, _ = build(family)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % VOCAB
    for visibility, leaks in [
        (Visibility("bidirectional"), True),
        (Visibility("causal"), False),
        (annealed("window", 0.2, 0, LENGTH, None), False),
    ]:
        difference = (denoiser.hidden(ids, visibility)[:, 0] - denoiser.hidden(other, visibility)[:, 0]).abs().max()
        assert (difference > 1e-6) == leaks, visibility.pattern


@torch.no_grad()
def test_causal_logits_equal_those_of_the_original_model(family, ids):
    denoiser, config = build(family)
    assert torch.equal(logits(denoiser, ids, Visibility("causal")), stock(denoiser, config)(ids).logits)


@torch.no_grad()
def test_documents_do_not_see_each_other(family, ids):
    denoiser, _ = build(family)
    documents = torch.tensor([[0] * 10 + [1] * (LENGTH - 10)]).expand(3, -1)
    other = ids.clone()
    other[:, :10] = (other[:, :10] + 1) % VOCAB
    for pattern in ("causal", "bidirectional"):
        visibility = Visibility(pattern, document_ids=documents)
        assert torch.equal(denoiser.hidden(ids, visibility)[:, 10:], denoiser.hidden(other, visibility)[:, 10:])


@pytest.mark.parametrize("tied", [False, True])
def test_a_meta_build_equals_the_eager_build_including_buffers(family, tied):
    meta, config = build(family, tied=tied)
    eager = HuggingFaceDenoiser(config, VOCAB, True)
    parallel.initialize(eager, seed=1)
    ours, theirs = (dict(d.named_parameters()) | dict(d.named_buffers()) for d in (meta, eager))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    head, embedding = meta.network.get_output_embeddings().weight, meta.network.get_input_embeddings().weight
    assert (head is embedding) == tied


@torch.no_grad()
def test_stock_transformers_gives_the_bidirectional_logits_of_our_configuration(family, ids):
    denoiser, config = build(family)
    ours = logits(denoiser, ids, Visibility("bidirectional"))
    assert torch.allclose(ours, stock(denoiser, config, is_causal=False)(ids).logits, atol=1e-6)


@torch.no_grad()
def test_clean_causal_shifted_cross_entropy_equals_the_models_loss(family, ids):
    denoiser, config = build(family)
    model = stock(denoiser, config)
    maskable = maskable_positions(torch.zeros(3, LENGTH, dtype=torch.int32).numpy())
    batch = Batch(ids, exact_draw(maskable), Visibility("causal"))
    loss = Autoregressive()(denoiser, batch).weighted_sum / maskable.sum()
    # The model's loss gives the mask token a share of the probability; the denoiser gives it none.
    scores = model(ids).logits[:, :-1]
    scores[..., VOCAB] = float("-inf")
    assert loss.item() == pytest.approx(F.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten()).item(), rel=1e-6)
    plain = HuggingFaceDenoiser(config, None, True)
    plain.load_state_dict(denoiser.state_dict())
    loss = Autoregressive()(plain.eval(), batch).weighted_sum / maskable.sum()
    assert loss.item() == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-6)


@pytest.mark.parametrize("mask_id", [VOCAB, 7])
def test_the_mask_token_gets_no_probability(mask_id):
    denoiser, _ = build("llama", mask_id=mask_id)
    rows = torch.randn(5, 32)
    log_probs = denoiser.reduce_logits(rows, lambda logits: logits.log_softmax(-1))
    full = denoiser.network.lm_head(rows)
    full[:, mask_id] = float("-inf")
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(5))
    assert torch.allclose(log_probs, full.log_softmax(-1)[:, : log_probs.shape[1]], atol=1e-6)


def test_chunked_logits_have_the_same_values_and_gradients(monkeypatch):
    results = []
    for elements in (2**25, (VOCAB + 1) * 4):
        monkeypatch.setattr("dlm_ray.models.denoiser.CHUNK_ELEMENTS", elements)
        denoiser, _ = build("llama")
        rows = torch.randn(10, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        targets = torch.arange(10)
        denoiser.reduce_logits(
            rows, lambda logits, target: F.cross_entropy(logits, target, reduction="none"), targets
        ).sum().backward()
        results.append((rows.grad, denoiser.network.lm_head.weight.grad))
    for one, two in zip(*results, strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_rows_for_applies_the_shift():
    positions = torch.tensor([1, 5])
    assert build("llama", shift=True)[0].rows_for(positions).tolist() == [0, 4]
    assert build("llama", shift=False)[0].rows_for(positions).tolist() == [1, 5]


def test_sliding_windows_are_overridden():
    fields = {
        "model_type": "mistral",
        "sliding_window": 4,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }
    assert families.read_config(fields).sliding_window is None


def test_another_family_is_accepted_if_it_passes_the_gates_and_otherwise_refused_with_what_fails():
    assert families.read_config({"model_type": "olmo2", "hidden_size": 64}).hidden_size == 64
    with pytest.raises(
        UserError, match=r"'bloom' is not supported: it does not pass these checks:\n  causal logits equal"
    ):
        families.read_config({"model_type": "bloom"})
    with pytest.raises(UserError, match="'no_such_model' is not supported; supported families are gpt2"):
        families.read_config({"model_type": "no_such_model"})


def test_architecture_of_inverts_scratch_config(family):
    config = families.scratch_config(architecture(family), VOCAB, 0, 0)
    again = families.scratch_config(families.architecture_of(config), VOCAB, 0, 0)
    assert again.to_dict() == config.to_dict()
