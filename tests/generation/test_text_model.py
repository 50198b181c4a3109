"""TextModel: scores equal to stock transformers, infilling that keeps both sides, exports of the same model."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.data import make_data, make_documents
from helpers.recipes import tiny_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlm_ray.checkpoint.export import export
from dlm_ray.cli import console
from dlm_ray.config.errors import UserError
from dlm_ray.data.build import split_of
from dlm_ray.data.reading import read_split
from dlm_ray.diffusion import likelihood
from dlm_ray.diffusion.draws import maskable_positions
from dlm_ray.diffusion.objectives import Block
from dlm_ray.diffusion.visibility import Visibility, documents_apart
from dlm_ray.generation.loading import as_unadapted, load
from dlm_ray.training import loop


@pytest.fixture(scope="module")
def runs(data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    loop.fit(tiny_recipe(data_folder, "base", objective__name="autoregressive", training__steps=40), folder / "base")
    loop.fit(
        tiny_recipe(
            data_folder, "adapted", model__architecture=None, model__base=str(folder / "base"), training__steps=30
        ),
        folder / "adapted",
    )
    return folder


def test_bits_of_an_autoregressive_model_equal_the_cross_entropy_of_stock_transformers(runs, data_folder, tmp_path):
    exported = export(str(runs / "base"), str(tmp_path / "export"))
    stock = AutoModelForCausalLM.from_pretrained(exported).eval()
    nats, num_bytes = 0.0, 0
    with torch.no_grad():
        for row in read_split(data_folder, "held_out"):
            for document in np.unique(
                row.document_ids[row.document_ids >= 0]
            ):  # one at a time: no document sees another
                ids = torch.from_numpy(row.input_ids[row.document_ids == document].astype(np.int64))
                # Positions run on over documents in a row.
                start = int(np.flatnonzero(row.document_ids == document)[0])
                logits = stock(ids[None], position_ids=torch.arange(start, start + len(ids))[None]).logits[0, :-1]
                nats += F.cross_entropy(logits, ids[1:], reduction="sum").item()
            num_bytes += int(row.num_bytes.sum())
    scored = load(runs / "base").bits_per_byte(data_folder)
    assert scored["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert not scored["is_bound"] and scored["ci95_draws"] is None
    assert scored["tokens"] == sum(
        int(maskable_positions(row.document_ids[None]).sum()) for row in read_split(data_folder, "held_out")
    )


def test_bits_of_a_diffusion_model_are_a_bound_with_intervals(runs, data_folder):
    scored = load(runs / "adapted").bits_per_byte(data_folder, draws_per_sequence=8)
    assert scored["is_bound"]
    for interval in ("ci95_documents", "ci95_draws"):
        assert scored[interval][0] < scored["bits_per_byte"] < scored[interval][1]
    more = load(runs / "adapted").bits_per_byte(data_folder, draws_per_sequence=32)
    assert scored["ci95_draws"][0] < more["bits_per_byte"] < scored["ci95_draws"][1]
    assert more["ci95_draws"][1] - more["ci95_draws"][0] < scored["ci95_draws"][1] - scored["ci95_draws"][0]


@pytest.mark.parametrize("sequence_length", [12, 20, 24])
def test_a_block_checkpoint_scores_rows_of_any_length_in_the_blocks_it_was_trained_with(
    sequence_length, data_folder, tmp_path, recwarn
):
    """Sequences that are not whole blocks are padded with a warning; the score is that of data built with padding."""
    loop.fit(
        tiny_recipe(data_folder, "block", objective={"name": "block", "block_tokens": 8}, training__steps=2),
        tmp_path / "run",
    )
    model = load(tmp_path / "run")
    short = make_data(tmp_path / "short", sequence_length=sequence_length, tokenizer=model.tokenizer)
    recwarn.clear()
    scored = model.score(short, draws_per_sequence=2)
    messages = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
    if sequence_length % 8:
        assert (
            len(messages) == 1
            and f"sequences of {sequence_length} tokens" in messages[0]
            and "blocks of 8" in messages[0]
            and "padding" in messages[0]
        )
    else:
        assert not messages
    sequences = read_split(short, "held_out")
    x_0 = np.zeros((len(sequences), 24), dtype=np.int64)
    document_ids = np.full((len(sequences), 24), -1)
    for target, field in zip((x_0, document_ids), ("input_ids", "document_ids"), strict=True):
        target[:, :sequence_length] = [getattr(sequence, field) for sequence in sequences]

    def visible(ids):
        return Visibility("bidirectional", document_ids=documents_apart(ids, True, model.device))

    expected = likelihood.token_nats(
        model.denoiser, Block(block_tokens=8), x_0, document_ids, visible, model.device, num_draws=2
    )
    assert scored.nats.sum() == pytest.approx(expected.nats.sum(), rel=1e-5)
    assert scored.num_tokens == int(maskable_positions(document_ids).sum())


def test_sequences_beyond_the_positions_are_refused_and_longer_than_in_training_warn(runs, data_folder, tmp_path):
    model = load(runs / "adapted")
    with pytest.warns(UserWarning, match="sequences of 40 tokens, and the checkpoint was trained on sequences of 32"):
        model.score(make_data(tmp_path / "longer", sequence_length=40, tokenizer=model.tokenizer), draws_per_sequence=1)
    with pytest.raises(
        UserError, match=r"sequences of 80 tokens.*the network has 64; build the data with a smaller `sequence_length`"
    ):
        model.score(make_data(tmp_path / "too-long", sequence_length=80, tokenizer=model.tokenizer))


@pytest.mark.parametrize("nothing", [{"draws_per_sequence": 0}, {"max_sequences": 0}, {"max_sequences": -3}], ids=str)
def test_zero_draws_or_sequences_are_refused(nothing, runs, data_folder):
    with pytest.raises(UserError, match=r"(draws_per_sequence|max_sequences)=(0|-3): must be at least 1"):
        load(runs / "adapted").score(data_folder, **nothing)


def test_one_document_has_no_interval_and_the_console_reports_that(runs, data_folder, tmp_path, capsys):
    model = load(runs / "base")
    documents = [text for text in make_documents() if split_of(text, 0.2) == "train"][:3]
    documents += [text for text in make_documents() if split_of(text, 0.2) == "held_out"][:1]
    scored = model.bits_per_byte(make_data(tmp_path / "one", documents=documents, tokenizer=model.tokenizer, parts=1))
    assert scored["documents"] == 1 and scored["ci95_documents"] is None
    console.print_bits(scored)
    assert "no interval over documents" in " ".join(capsys.readouterr().err.split())


def test_comparisons_are_paired_on_documents_and_draws(runs, data_folder):
    base, adapted = load(runs / "base"), load(runs / "adapted")
    unadapted = as_unadapted(base, "bidirectional").score(data_folder, draws_per_sequence=4)
    difference = adapted.score(data_folder, draws_per_sequence=4).minus(unadapted)
    low, high = difference["ci95_documents_paired"]
    assert low < difference["bits_per_byte"] < high < 0  # 30 steps of adaptation lower the bound


def test_averaged_weights_are_the_default_and_raw_weights_an_option(runs):
    ema, raw, default = (load(runs / "adapted", kind) for kind in ("ema", "raw", None))
    name, averaged = next(iter(ema.denoiser.named_parameters()))
    assert torch.equal(dict(default.denoiser.named_parameters())[name], averaged)
    assert not torch.equal(dict(raw.denoiser.named_parameters())[name], averaged)


@pytest.mark.parametrize("rule", ["confidence", "ancestral"])
def test_infilling_keeps_both_sides_and_is_reproducible(runs, rule):
    model = load(runs / "adapted")
    canvases = []
    keep = {"length_tokens": 5, "rule": rule, "seed": 3, "on_step": lambda step, steps, canvas: canvases.append(canvas)}
    [text] = model.infill("the model reads", " and writes", **keep)
    assert text == model.infill("the model reads", " and writes", num_samples=3, **keep)[0]
    prefix_ids, suffix_ids = (
        model.tokenizer.encode(side, add_special_tokens=False) for side in ("the model reads", " and writes")
    )
    for canvas in canvases:
        assert canvas.ids[0, 1 : 1 + len(prefix_ids)].tolist() == prefix_ids
        assert canvas.ids[0, 1 + len(prefix_ids) + 5 :].tolist() == suffix_ids
    assert len(model.tokenizer.encode(text, add_special_tokens=False)) > 0


def test_a_sample_ends_at_the_end_of_text_token(runs):
    model = load(runs / "adapted")
    assert all("<|endoftext|>" not in text for text in model.sample(num_samples=8, length_tokens=20, steps=4))
    assert model.decode_until_end([5, model.tokenizer_identity.end_id, 6]) == model.tokenizer.decode([5])


def test_an_autoregressive_checkpoint_decodes_like_stock_greedy_decoding(runs, tmp_path):
    exported = export(str(runs / "base"), str(tmp_path / "export"))
    stock, tokenizer = AutoModelForCausalLM.from_pretrained(exported).eval(), AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer.encode("the model", add_special_tokens=False)
    ids = torch.tensor([[tokenizer.bos_token_id, *prompt]])
    expected = stock.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    model = load(runs / "base")
    [text] = model.sample("the model", length_tokens=8, temperature=0)
    assert text == model.decode_until_end(expected)
    with pytest.raises(UserError, match="is autoregressive: it cannot infill"):
        model.infill("a", "b", length_tokens=2)


@torch.no_grad()
def test_an_export_is_the_same_model_in_stock_transformers_and_when_loaded_again(runs, data_folder, tmp_path):
    exported = export(str(runs / "adapted"), str(tmp_path / "export"))
    ours, stock = load(runs / "adapted"), AutoModelForCausalLM.from_pretrained(exported).eval()
    ids = torch.tensor([[0, 5, 9, ours.denoiser.mask_id, 7, ours.denoiser.mask_id]])
    from dlm_ray.diffusion.visibility import Visibility

    expected = ours.denoiser.network.get_output_embeddings()(ours.denoiser.hidden(ids, Visibility("bidirectional")))
    assert torch.allclose(stock(ids).logits, expected, atol=1e-6)
    again = load(exported)
    assert again.score(data_folder, draws_per_sequence=2).bits_per_byte == pytest.approx(
        ours.score(data_folder, draws_per_sequence=2).bits_per_byte, rel=1e-6
    )
    config = json.loads((exported / "config.json").read_text())
    assert config["is_causal"] is False and config["mask_token_id"] == ours.denoiser.mask_id
    assert "transformers >=" in " ".join((exported / "README.md").read_text().split())
    with pytest.raises(UserError, match="exists and is not empty"):
        export(str(runs / "adapted"), str(exported))
    assert not list(tmp_path.glob("*.tmp-*"))


def test_inputs_that_do_not_fit_the_checkpoint_are_refused(runs, data_folder, tmp_path):
    model = load(runs / "adapted")
    with pytest.raises(UserError, match="trained on sequences of 32"):
        model.sample("word " * 40, length_tokens=5)
    with pytest.raises(
        UserError,
        match="steps=0: must be a whole number, .*; rule=best: does not belong .* one of confidence, ancestral",
    ):
        model.sample(steps=0, rule="best")
    with pytest.raises(UserError, match="top_p=0.0"):
        model.sample(top_p=0.0, length_tokens=3)
    with pytest.raises(UserError, match="build the data with the checkpoint's tokenizer"):
        model.score(make_data(tmp_path / "other", vocab=310))
    with pytest.raises(UserError, match="holds no averaged weights"):
        folder = tmp_path / "raw"
        loop.fit(tiny_recipe(data_folder, "raw", ema=None, training__steps=2), folder)
        load(folder, "ema")
