"""Sampling block by block from block, autoregressive and whole-row checkpoints, and the options that are refused."""

import json
import re
import warnings

import pytest
import torch
from helpers.commands import dlm_ray
from helpers.recipes import tiny_recipe
from helpers.two_passes import two_passes

from dlm_ray.config.errors import UserError
from dlm_ray.config.load import validate
from dlm_ray.diffusion.samplers.adjust import banned
from dlm_ray.diffusion.samplers.requests import Request
from dlm_ray.diffusion.samplers.rules import Threshold
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
def test_a_text_exceeds_the_context_and_does_not_depend_on_the_batch(runs, name, rule):
    model, seen = load(runs / name), []
    options = {"length_tokens": 70, "rule": rule, "seed": 4}
    texts = model.sample("the model", num_samples=3, on_step=lambda *now: seen.append(now), **options)
    assert texts[0] == model.sample("the model", **options)[0]
    assert len(set(texts)) == 3 and texts.stopped_by == ["length"] * 3
    assert all(done <= total for done, total, _ in seen) and seen[-1][0] == seen[-1][1]
    calls = texts.network_calls
    if name == "ar":  # one call per token but the last, one for the prompt, and re-encoding every half context
        assert calls["denoising"] == 0 and 70 <= calls["cache"] <= 70 + 6
    else:
        assert 0 < calls["denoising"] <= 10 * 8
        assert 0 < calls["cache"] <= 6  # contexts that are encoded again; the next block's first call commits a block


def test_a_model_trained_with_a_causal_context_is_sampled_with_one(runs):
    model = load(runs / "causal4")
    assert model.objective.context == "clean_causal"
    request = Request(model.prompt_ids(model.encode("the model")), 20, seed=0)
    forbidden = model.forbidden_token_ids(False, ())
    options = {"num_steps": 4, "temperature": 0.0, "adjust": banned(forbidden) if forbidden else None}
    expected = two_passes(
        model.denoiser, request, Threshold(0.3), block_tokens=4, context_tokens=32, is_context_causal=True, **options
    )
    [text] = model.sample("the model", length_tokens=20, temperature=0.0, rule="threshold", threshold=0.3)
    assert text == model.decode_until_end(expected.ids)


def test_steps_count_per_block_and_the_default_length_fills_the_context(runs):
    model = load(runs / "block8")
    few = model.sample(steps=2, seed=1)
    assert few.network_calls["denoising"] == 2 * 4  # 32 positions, 4 blocks
    assert model.sample(seed=1).network_calls["denoising"] == 31


def test_a_checkpoint_with_one_block_per_context_samples_the_whole_canvas_and_infills(runs):
    model = load(runs / "block32")
    assert model.sample(length_tokens=9, steps=3).network_calls == {"denoising": 3, "cache": 0}
    assert len(model.infill("the", "reads", length_tokens=3)) == 1
    with pytest.raises(UserError, match=r"of blocks of 8 tokens, which see nothing after themselves: it cannot infill"):
        load(runs / "block8").infill("the", "reads", length_tokens=3)
    with pytest.raises(UserError, match="block_tokens=8: a block sees no suffix"):
        model.infill("the", "reads", length_tokens=3, block_tokens=8)


def test_a_context_is_rounded_down_to_whole_blocks(runs):
    model = load(runs / "block8")
    common = {"objective": model.objective, "document_mask": True}
    wide, fitting = (
        TextModel(model.denoiser, model.tokenizer, model.tokenizer_identity, sequence_length=size, **common)
        for size in (30, 24)
    )
    assert wide.sequence_length == 24
    assert wide.sample("the", length_tokens=40, seed=1) == fitting.sample("the", length_tokens=40, seed=1)


def test_a_block_size_that_differs_from_training_warns_with_both_sizes(runs):
    with pytest.warns(UserWarning, match="trained on blocks of 8 tokens and is sampled by blocks of 4 tokens"):
        load(runs / "block8").sample(length_tokens=5, block_tokens=4)
    with pytest.warns(UserWarning, match="on whole sequences of 32 tokens and is sampled by blocks of 8 tokens"):
        texts = load(runs / "whole").sample("the", length_tokens=40, block_tokens=8, rule="first_hitting")
    assert texts.network_calls["cache"] > 0
    with pytest.warns(UserWarning, match="on blocks of 8 tokens and is sampled by whole sequences of 32 tokens"):
        load(runs / "block8").sample(length_tokens=5, block_tokens=32)


@pytest.mark.parametrize("name", ["ar", "block8", "whole"])
def test_banned_tokens_are_never_sampled_and_forced_text_is_at_its_position(runs, name):
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


def test_adjust_sees_absolute_positions_and_a_reward_selects_candidates(runs):
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
    selected = model.sample("the model", **common, candidates=4, reward=spaces, reward_temperature=0.0)
    assert sum(map(spaces, selected)) > sum(map(spaces, model.sample("the model", **common)))


def test_a_stop_rule_ends_a_text(runs):
    model = load(runs / "block8")
    end = model.tokenizer_identity.end_id
    texts = model.sample(
        length_tokens=30,
        stop=["end"],
        adjust=lambda logits, rows, positions: logits.index_fill(1, torch.tensor(end), 9.0),
    )
    assert texts.stopped_by == ["end"]
    repetitive = model.sample(
        length_tokens=300, stop=["entropy"], adjust=lambda logits, *_: logits.index_fill(1, torch.tensor(5), 50.0)
    )
    assert repetitive.stopped_by == ["entropy"] and len(ids_of(model, repetitive[0])) < 10


def test_options_out_of_range_or_of_another_rule_are_refused(runs, data_folder):
    model = load(runs / "block8")
    for options, message in [
        ({"threshold": -0.1, "rule": "threshold"}, "threshold=-0.1: must be a finite number, at least 0 and at most 1"),
        ({"threshold": 0.5}, "threshold=0.5: belongs to rule=threshold, and the rule is confidence"),
        ({"rule": "factor", "factor": 0.0}, "factor=0.0: must be a finite number, more than 0"),
        ({"temperature": float("inf")}, "temperature=inf: must be a finite number, at least 0 and at most 100"),
        ({"temperature": float("nan")}, "temperature=nan: must be a finite number"),
        ({"rule": "factor", "factor": float("inf")}, "factor=inf: must be a finite number, more than 0"),
        ({"rule": "entropy_bounded", "entropy_bound": -1.0}, "entropy_bound=-1.0: must be a finite number, at least 0"),
        ({"rule": "ancestral", "remask": 1.5}, "remask=1.5: must be a finite number, at least 0 and at most 1"),
        ({"block_tokens": 5}, "block_tokens=5: blocks have to fill the context of 32 tokens"),
        ({"stop": ["never"]}, "stop=never: must be one of end, entropy"),
        ({"noise": "float32_gumbel"}, "noise=float32_gumbel: is for the whole canvas"),
        ({"candidates": 3}, "`candidates` and `reward` go together"),
        ({"ban": ["the model reads"]}, "must be one token, and this text is"),
        ({"force": {4: " the model"}, "length_tokens": 5}, "force=4= the model: token 5 is not among the 5"),
        (
            {"rule": "tweedie"},
            "one of confidence, first_hitting, ancestral, margin, threshold, factor, entropy_bounded",
        ),
    ]:
        with pytest.raises(UserError, match=re.escape(message)) as error:
            model.sample("the", **{"length_tokens": 8, **options})
        assert error.value.field in options and "--" not in str(error.value)
    with pytest.raises(UserError, match="must be at least 1, and .* in the context of 32 leave room for 0"):
        model.sample("word " * 40)
    with pytest.raises(UserError, match="trained on sequences of 32, which leaves 0"):
        model.sample("word " * 40, length_tokens=5)
    with pytest.raises(UserError, match="`stop` is for sampling block by block, and this samples the whole canvas"):
        load(runs / "whole").sample(length_tokens=5, stop=["end"])
    with pytest.raises(UserError, match="block_tokens=4: this checkpoint is autoregressive"):
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


def test_the_command_line_samples_with_the_same_options(runs):
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
    done = dlm_ray("sample", runs / "block8", "--top-p", "2", "--threshold", "0.5")
    assert done.returncode == 2 and "--top-p 2.0: must be a finite number, more than 0 and at most 1" in done.message
    assert "--threshold 0.5: belongs to --rule threshold, and the rule is confidence" in done.message


CUSTOM_RULE = """
from dlm_ray.diffusion.samplers.rules import FirstHitting, LeftToRight

class FirstMasked(LeftToRight):
    pass

class NeedsArguments(LeftToRight):
    def __init__(self, size):
        self.size = size

class NoRule:
    pass
"""


def test_a_custom_rule_is_named_by_its_class_in_python_and_in_the_recipe(runs, tmp_path, monkeypatch):
    (tmp_path / "custom_rules.py").write_text(CUSTOM_RULE)
    monkeypatch.syspath_prepend(tmp_path)
    model = load(runs / "block8")
    model.rules = (*model.rules, "left_to_right")
    expected = model.sample("the", length_tokens=12, seed=1, rule="left_to_right")
    assert model.sample("the", length_tokens=12, seed=1, rule="custom_rules:FirstMasked") == expected
    model.sampling = model.sampling.model_copy(update={"rule": "custom_rules:FirstMasked"})
    assert model.sample("the", length_tokens=12, seed=1) == expected
    for rule, message in [
        ("custom_rules:Absent", "has no class Absent"),
        ("absent_module:Rule", "cannot be imported"),
        ("custom_rules:NoRule", "lacks step"),
        ("custom_rules:NeedsArguments", "must be a class without required arguments"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            model.sample("the", length_tokens=4, rule=rule)
        assert error.value.field == "rule" and rule in str(error.value)
    with pytest.raises(UserError, match="rule=custom_rules:FirstMasked: does not belong to the checkpoint's objective"):
        load(runs / "ar").sample(length_tokens=4, rule="custom_rules:FirstMasked")
