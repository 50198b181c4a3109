"""Text block by block from checkpoints: of blocks, autoregressive, and whole rows that are sampled in blocks; what is refused."""

import json
import warnings

import pytest
import torch
from helpers.commands import dlm_ray
from helpers.recipes import tiny_recipe

from dlm_ray.config.errors import UserError
from dlm_ray.config.load import validate
from dlm_ray.generation.loading import load
from dlm_ray.generation.text_model import TextModel


@pytest.fixture(autouse=True)
def no_other_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def ids_of(model, text):
    return model.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(("name", "rule"), [("ar", None), ("block8", None), ("block8", "threshold")])
def test_text_is_longer_than_the_context_and_the_same_in_any_company(runs, name, rule):
    model, seen = load(runs / name), []
    options = {"length_tokens": 70, "rule": rule, "seed": 4}
    texts = model.sample("the model", num_samples=3, on_step=lambda *now: seen.append(now), **options)
    assert texts[0] == model.sample("the model", **options)[0]
    assert len(set(texts)) == 3 and texts.stopped_by == ["length"] * 3
    assert all(done <= total for done, total, _ in seen) and seen[-1][0] == seen[-1][1]
    calls = texts.network_calls
    if name == "ar":  # a call a token but the last, the prompt, and every half context what is encoded again
        assert calls["denoising"] == 0 and 70 <= calls["cache"] <= 70 + 6
    else:
        assert 0 < calls["denoising"] <= 10 * 8 and calls["cache"] > 8


def test_steps_are_of_a_block_and_a_whole_row_is_written_without_a_length(runs):
    model = load(runs / "block8")
    few = model.sample(steps=2, seed=1)
    assert few.network_calls["denoising"] == 2 * 4  # 32 positions, 4 blocks
    assert model.sample(seed=1).network_calls["denoising"] == 31


def test_a_block_of_the_whole_row_is_the_whole_canvas_and_can_infill(runs):
    model = load(runs / "block32")
    assert model.sample(length_tokens=9, steps=3).network_calls == {"denoising": 3, "cache": 0}
    assert len(model.infill("the", "reads", length_tokens=3)) == 1
    with pytest.raises(
        UserError, match=r"of blocks of 8 tokens, which see nothing behind themselves: it cannot infill"
    ):
        load(runs / "block8").infill("the", "reads", length_tokens=3)
    with pytest.raises(UserError, match="--block-tokens 8: a block sees no suffix"):
        model.infill("the", "reads", length_tokens=3, block_tokens=8)


def test_a_context_that_is_not_whole_blocks_is_used_as_far_as_they_fill_it(runs):
    own = load(runs / "block8")
    parts = {"objective": own.objective, "document_mask": True}
    wide, fitting = (
        TextModel(own.denoiser, own.tokenizer, own.tokenizer_identity, sequence_length=size, **parts)
        for size in (30, 24)
    )
    assert wide.sequence_length == 24
    assert wide.sample("the", length_tokens=40, seed=1) == fitting.sample("the", length_tokens=40, seed=1)


def test_a_size_that_was_not_trained_is_warned_of_with_both_named(runs):
    with pytest.warns(UserWarning, match="trained on blocks of 8 tokens and is sampled by blocks of 4 tokens"):
        load(runs / "block8").sample(length_tokens=5, block_tokens=4)
    with pytest.warns(UserWarning, match="trained on whole rows of 32 tokens and is sampled by blocks of 8 tokens"):
        texts = load(runs / "whole").sample("the", length_tokens=40, block_tokens=8, rule="first_hitting")
    assert texts.network_calls["cache"] > 0
    with pytest.warns(UserWarning, match="trained on blocks of 8 tokens and is sampled by whole rows of 32 tokens"):
        load(runs / "block8").sample(length_tokens=5, block_tokens=32)


@pytest.mark.parametrize("name", ["ar", "block8", "whole"])
def test_banned_text_never_comes_and_forced_text_stands_where_it_was_put(runs, name):
    model = load(runs / name)
    common = {"length_tokens": 20, "num_samples": 4, "seed": 2}
    word = next(text for text in (" the", " model", "e") if len(ids_of(model, text)) == 1)
    [token] = ids_of(model, word)
    seen = []

    def look(logits, rows, positions):
        seen.append(bool((logits[:, token] == float("-inf")).all()))
        return logits

    model.sample("the", **common, ban=[word], adjust=look)
    assert seen and all(seen)
    forced = ids_of(model, " reads a row")
    for text in model.sample("the", **common, force={0: " reads a row", len(forced) + 3: word}, ban=[word]):
        assert text.startswith(" reads a row") and word in text[len(" reads a row") :]


def test_a_hook_sees_absolute_positions_and_a_reward_prefers(runs):
    model, seen = load(runs / "block8"), set()

    def look(logits, rows, positions):
        seen.update(zip(rows.tolist(), positions.tolist(), strict=True))
        return logits

    prompt = len(ids_of(model, "the model"))
    model.sample("the model", length_tokens=10, num_samples=2, adjust=look)
    last = -(-(1 + prompt + 10) // 8) * 8
    assert seen == {(row, position) for row in (0, 1) for position in range(1 + prompt, last)}

    def spaces(text):
        return text.count(" ")

    common = {"length_tokens": 40, "seed": 3, "num_samples": 4}
    chosen = model.sample("the model", **common, candidates=4, reward=spaces, reward_temperature=0.0)
    assert sum(map(spaces, chosen)) > sum(map(spaces, model.sample("the model", **common)))


def test_stop_rules_end_a_text(runs):
    model = load(runs / "block8")
    end = model.tokenizer_identity.end_id
    texts = model.sample(
        length_tokens=30,
        stop=["end"],
        adjust=lambda logits, rows, positions: logits.index_fill(1, torch.tensor(end), 9.0),
    )
    assert texts.stopped_by == ["end"]
    dull = model.sample(
        length_tokens=300, stop=["entropy"], adjust=lambda logits, *_: logits.index_fill(1, torch.tensor(5), 50.0)
    )
    assert dull.stopped_by == ["entropy"] and len(ids_of(model, dull[0])) < 10


def test_what_does_not_belong_is_said(runs, data_folder):
    model = load(runs / "block8")
    for options, message in [
        ({"threshold": -0.1, "rule": "threshold"}, r"--threshold -0.1: a probability, from 0 to 1"),
        ({"threshold": 0.5}, "--threshold 0.5 belongs to --rule threshold, and the rule is confidence"),
        ({"rule": "factor", "factor": 0.0}, "--factor 0.0: more than 0"),
        ({"temperature": float("inf")}, "--temperature inf: 0 or more, and finite"),
        ({"temperature": float("nan")}, "--temperature nan: 0 or more, and finite"),
        ({"rule": "factor", "factor": float("inf")}, "--factor inf: more than 0, and finite"),
        ({"rule": "entropy_bounded", "entropy_bound": -1.0}, "--entropy-bound -1.0: 0 or more"),
        ({"rule": "ancestral", "remask": 1.5}, "--remask 1.5: a probability"),
        ({"block_tokens": 5}, "--block-tokens 5: blocks have to fill the context of 32 tokens"),
        ({"stop": ["never"]}, "--stop never: one of end, entropy"),
        ({"noise": "float32_gumbel"}, "--noise float32_gumbel is for the whole canvas"),
        ({"candidates": 3}, "candidates and reward go together"),
        ({"ban": ["the model reads"]}, "tokens of this tokenizer, and one token at a time"),
        ({"force": {4: " the model"}, "length_tokens": 5}, "--force 4= the model: token 5 is not among the 5"),
        (
            {"rule": "tweedie"},
            "one of confidence, first_hitting, ancestral, margin, threshold, factor, entropy_bounded",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            model.sample("the", **{"length_tokens": 8, **options})
    with pytest.raises(UserError, match="the context of 32 needs room for at least 1"):
        model.sample("word " * 40)
    with pytest.raises(UserError, match="trained on rows of 32, which leaves 0"):
        model.sample("word " * 40, length_tokens=5)
    with pytest.raises(UserError, match="--stop is for sampling block by block, and this is the whole canvas"):
        load(runs / "whole").sample(length_tokens=5, stop=["end"])
    with pytest.raises(UserError, match="--block-tokens 4: this checkpoint is autoregressive"):
        load(runs / "ar").sample(length_tokens=5, block_tokens=4)
    for changes in (
        {"sampling__threshold": -0.5},
        {"sampling__factor": 0},
        {"sampling__entropy_bound": -1},
        {"sampling__remask": 2},
    ):
        tree = tiny_recipe(data_folder).model_dump(mode="json")
        [(key, value)] = changes.items()
        tree["sampling"][key.split("__")[1]] = value
        with pytest.raises(UserError, match=key.replace("__", ".")):
            validate(tree, "tiny")


def test_from_the_command_line(runs):
    options = ["--prompt", "the", "--length", 12, "--rule", "threshold", "--threshold", 0.3, "--block-tokens", 4]
    done = dlm_ray("sample", runs / "block8", *options, "--force", "0= model", "--stop", "end", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["texts"][0].startswith("the model") and set(result["network_calls"]) == {"denoising", "cache"}
    assert (
        "warning: the checkpoint was trained on blocks of 8 tokens and is sampled by blocks of 4 tokens" in done.message
    )
    done = dlm_ray("sample", runs / "block8", "--force", "the")
    assert done.returncode == 2 and "allowed is N=TEXT" in done.message
