"""Every objective is a run like any other.

It learns, resumes bit for bit, is scored and sampled by what belongs to it.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers.processes import run_ranks
from helpers.recipes import tiny_recipe
from helpers.runs import assert_same_tensors, metrics, tensors
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import dlm_ray
from dlm_ray.checkpoint import commit, listing
from dlm_ray.checkpoint.export import export
from dlm_ray.config.errors import UserError
from dlm_ray.config.objective import rules_of
from dlm_ray.config.server import Server
from dlm_ray.data.tokenizer import train_tokenizer
from dlm_ray.diffusion.denoiser import LossSum
from dlm_ray.diffusion.objectives import Masked
from dlm_ray.serving.engine import Engine
from dlm_ray.serving.processor import RequestProcessor
from dlm_ray.training import loop, teacher

pytestmark = pytest.mark.long

OBJECTIVES = {
    "masked-cosine": {"objective__schedule": {"name": "cosine"}},
    "masked-count": {"objective__mask_sampler": "count"},
    "masked-discrete": {"objective__num_timesteps": 50},
    "masked-complementary": {"objective__complementary": True, "objective__draws_per_sequence": 2},
    "masked-clipped": {"objective__clip": {"beta": 0.3, "omega": 0.8}},
    "masked-context": {"objective__context_weights": 0.3, "objective__times": "antithetic"},
    "masked-terms": {"objective__confidence_weight": 0.5, "objective__autoregressive_weight": 0.2},
    "block": {"objective__name": "block", "objective__block_tokens": 4},
    "block-one-to-row-to-eight": {
        "objective": {"name": "block", "block_tokens": 8, "shift": False},
        "curriculum__block_sizes": [
            {"block_tokens": 1, "steps": 4},
            {"block_tokens": 32, "steps": 3},
            {"block_tokens": 16, "steps": 3},
        ],
        "curriculum__annealing": {"pattern": "bernoulli", "steps": 6},
    },
    "block-search": {
        "objective": {
            "name": "block",
            "block_tokens": 4,
            "clip": {"beta": 0.001, "omega": 1.0, "weight": "paper", "enforce": "counts"},
        },
        "curriculum__clip_search": {"every_steps": 6, "sequences": 6, "draws": 2},
    },
    "genmd4": {"objective__name": "genmd4"},
    "genmd4-scalar": {"objective__name": "genmd4", "objective__exponents": "scalar"},
    "sedd": {"objective__name": "sedd"},
    "d3pm": {"objective__name": "d3pm"},
    "tauldr-one": {"objective__name": "tauldr"},
    "tauldr-all": {"objective__name": "tauldr", "objective__estimator": "all_masked"},
    "ssd_lm": {
        "objective__name": "ssd_lm",
        "objective__shift": False,
        "objective__simplex": {"block_tokens": 5, "num_timesteps": 100},
    },
}


def curve(run_dir):
    return [event for event in metrics(run_dir) if "loss" in event]


def test_a_head_of_zeros_begins_at_ln_v_a_token(data_folder, tmp_path):
    """Exactly, where every row's weights sum to its tokens: counted masks."""
    head = {
        "model__architecture__zero_head": True,
        "model__architecture__tie_embeddings": False,
        "objective__mask_sampler": "count",
    }
    loop.fit(tiny_recipe(data_folder, "zeros", training__steps=2, optimizer__warmup_steps=0, **head), tmp_path / "run")
    vocab = commit.read_manifest(listing.latest(str(tmp_path / "run"))).tokenizer["vocab_size"]
    assert curve(tmp_path / "run")[0]["loss"] == pytest.approx(math.log(vocab), rel=1e-5)


@pytest.mark.parametrize("term", ["autoregressive", "alignment"])
def test_a_term_over_all_tokens_weighs_the_same_however_few_of_them_are_masked(term, data_folder, tmp_path):
    """`global_masked` divides the sum over masked tokens by their number, and a mean over all tokens by all tokens."""
    loop.fit(tiny_recipe(data_folder, "base", objective__name="autoregressive", training__steps=2), tmp_path / "base")
    own = {
        "model__architecture": None,
        "model__base": str(tmp_path / "base"),
        f"objective__{term}_weight": 0.5,
        "training__steps": 2,
    }
    own |= {"objective__schedule": {"name": "polynomial", "exponent": 12.0}}  # masks few
    first = {}
    for normalize_by in ("all_tokens", "global_masked"):
        recipe = tiny_recipe(data_folder, normalize_by, **own, objective__normalize_by=normalize_by)
        loop.fit(recipe, tmp_path / normalize_by)
        first[normalize_by] = curve(tmp_path / normalize_by)[0]
    assert first["global_masked"][term] == pytest.approx(first["all_tokens"][term], rel=1e-6)
    for line in first.values():
        assert line["loss"] == pytest.approx(line["bound"] + line[term], rel=1e-6)
    assert first["global_masked"]["bound"] > 5 * first["all_tokens"]["bound"]


class Overflows(Masked):
    """A custom objective whose loss is infinite at step 6."""

    def draw(self, key, x_0, maskable):
        self.is_bad = key.step == 5
        return super().draw(key, x_0, maskable)

    def forward(self, denoiser, batch):
        result = super().forward(denoiser, batch)
        return LossSum(result.weighted_sum * math.inf) if self.is_bad else LossSum(result.weighted_sum)


def test_a_loss_that_is_not_finite_stops_the_run_by_name_and_leaves_the_last_checkpoint_good(data_folder, tmp_path):
    recipe = tiny_recipe(
        data_folder, "bad", objective__name=f"{__name__}:Overflows", training__steps=16, checkpoint__every_steps=4
    )
    message = (
        r"step 6 \(sequences 60 to 71 of the run's order\) of objective test_objectives:Overflows: loss inf, gradient "
        r"norm nan, not finite"
    )
    with pytest.raises(FloatingPointError, match=message):
        loop.fit(recipe, tmp_path / "run")
    last = listing.latest(str(tmp_path / "run"))
    assert commit.read_manifest(last).step == 4 and commit.verify(last) == []
    assert all(torch.isfinite(commit.read_tensor(last, name)).all() for name in commit.read_manifest(last).arrays)


def _fit_on_a_rank(rank, recipes, out):
    torch.distributed.init_process_group("gloo")
    for recipe in recipes:
        loop.fit(recipe, Path(out) / recipe.name)
    torch.distributed.barrier()


def test_two_ranks_are_one_process_also_with_own_parameters_and_a_frozen_teacher(data_folder, tmp_path):
    base = tiny_recipe(data_folder, "base", objective__name="autoregressive")
    loop.fit(base, tmp_path / "base")
    aligned = {"model__architecture": None, "model__base": str(tmp_path / "base"), "objective__alignment_weight": 10.0}
    ssd_lm = dict(OBJECTIVES["ssd_lm"])
    recipes = [
        tiny_recipe(data_folder, "aligned", **aligned),
        tiny_recipe(data_folder, "ssd_lm", **ssd_lm),
        tiny_recipe(data_folder, "d3pm", **OBJECTIVES["d3pm"]),
        tiny_recipe(data_folder, "block", **OBJECTIVES["block-search"]),
    ]
    assert run_ranks(_fit_on_a_rank, 2, recipes, str(tmp_path / "two")) == [0, 0]
    for recipe in recipes:
        loop.fit(recipe, tmp_path / "one" / recipe.name)
        for one, two in zip(curve(tmp_path / "one" / recipe.name), curve(tmp_path / "two" / recipe.name), strict=True):
            assert one["loss"] == pytest.approx(two["loss"], rel=2e-4), recipe.name
    assert not any("teacher" in name for name in tensors(tmp_path / "one/aligned"))
    clips = [
        commit.read_manifest(listing.latest(str(tmp_path / ranks / "block"))).extra["clip"] for ranks in ("one", "two")
    ]
    assert clips[0] == clips[1] and clips[0] is not None


def test_alignment_pulls_the_states_towards_the_frozen_model(data_folder, tmp_path):
    """The term falls, it starts near 0 for a base that still attends causally, and the bound is logged without it."""
    loop.fit(tiny_recipe(data_folder, "base", objective__name="autoregressive", training__steps=20), tmp_path / "base")
    logged = {}
    for weight in (0.001, 30.0):
        changes = {
            "model__architecture": None,
            "model__base": str(tmp_path / "base"),
            "objective__alignment_weight": weight,
        }
        loop.fit(tiny_recipe(data_folder, f"aligned-{weight}", training__steps=20, **changes), tmp_path / str(weight))
        logged[weight] = [line["alignment"] / weight for line in curve(tmp_path / str(weight))]
    assert logged[0.001][0] == pytest.approx(logged[30.0][0], rel=1e-4)  # the same first step
    assert logged[30.0][-1] < 0.95 * logged[0.001][-1]
    with pytest.raises(UserError, match="aligns with an autoregressive model, and model.base=.* is a diffusion model"):
        teacher.describe(tiny_recipe(data_folder, **{**changes, "model__base": str(tmp_path / "30.0")}))
    line = curve(tmp_path / "30.0")[-1]
    assert line["loss"] == pytest.approx(line["bound"] + line["alignment"], rel=1e-5)


# Options of an objective that change no code of a run; their numbers are tested in tests/diffusion.
VARIANTS = {"masked-cosine", "masked-discrete", "masked-clipped", "masked-context", "genmd4-scalar", "tauldr-all"}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in VARIANTS else []) for name in OBJECTIVES],
)
def trained(request, data_folder, tmp_path_factory):
    """Return the recipe, the folder and the metrics of a run of 12 steps with a checkpoint at 6."""
    recipe = tiny_recipe(
        data_folder,
        request.param,
        training__steps=12,
        checkpoint__every_steps=6,
        validation__every_steps=6,
        **OBJECTIVES[request.param],
    )
    run_dir = tmp_path_factory.mktemp("objectives") / request.param
    return recipe, run_dir, loop.fit(recipe, run_dir)


def test_it_trains_and_its_validation_falls(trained):
    recipe, run_dir, result = trained
    name = "block_nll" if recipe.objective.name == "ssd_lm" else "nats_per_token"
    validated = [event["validation"][name] for event in metrics(run_dir) if "validation" in event]
    assert validated[-1] < validated[0]
    assert result["step"] == 12


def test_it_resumes_bit_for_bit(trained, tmp_path):
    recipe, run_dir, _ = trained
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(listing.latest(str(tmp_path / "run")))
    loop.fit(recipe, tmp_path / "run")
    assert_same_tensors(run_dir, tmp_path / "run")


def test_how_a_batch_is_cut_does_not_change_it(trained, tmp_path):
    recipe, run_dir, _ = trained
    cut = recipe.model_copy(update={"training": recipe.training.model_copy(update={"micro_batch_size": 4, "steps": 2})})
    loop.fit(cut, tmp_path / "run")
    for one, other in zip(curve(tmp_path / "run"), curve(run_dir), strict=False):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-4, abs=1e-4)


def test_it_is_sampled_by_its_own_rules_and_by_no_other(trained):
    recipe, run_dir, _ = trained
    model = dlm_ray.load(run_dir)
    for rule in rules_of(recipe.objective.name):
        options = {"length_tokens": 10, "steps": 4, "rule": rule, "num_samples": 2}
        texts = model.sample("the model", **options)
        assert len(texts) == 2 and model.sample("the model", **options) == texts
    with pytest.raises(
        UserError, match="rule=left_to_right: does not belong to the checkpoint's objective; must be one of"
    ):
        model.sample(length_tokens=4, rule="left_to_right")


def test_it_is_scored_by_a_bound_over_the_full_range_or_not_at_all(trained, data_folder):
    recipe, run_dir, result = trained
    model = dlm_ray.load(run_dir)
    if recipe.objective.name == "ssd_lm":
        with pytest.raises(UserError, match="no bits per byte"):
            model.score(data_folder)
        assert commit.read_manifest(result["checkpoint"]).capabilities["likelihood"] == "none"
    else:
        scored = model.bits_per_byte(data_folder, draws_per_sequence=4)
        assert scored["is_bound"] and 1.0 < scored["bits_per_byte"] < 6.0


def test_what_is_learned_beside_the_network_is_averaged_and_left_out_of_exports(trained, tmp_path):
    recipe, run_dir, result = trained
    own = {name for name in commit.read_manifest(result["checkpoint"]).arrays if "objective." in name}
    if recipe.objective.name == "genmd4":
        assert own == {
            "objective.theta",
            "ema.objective.theta",
            "optimizer.objective.theta.exp_avg",
            "optimizer.objective.theta.exp_avg_sq",
        }
        stored = commit.read_tensor(result["checkpoint"], "ema.objective.theta")
        assert torch.equal(dlm_ray.load(run_dir).objective.theta, stored)
        assert stored.std() > 0 if recipe.objective.exponents == "per_token" else len(stored) == 1
    else:
        assert bool(own) == (recipe.objective.name == "ssd_lm")
    if recipe.objective.name == "ssd_lm":
        with pytest.raises(UserError, match="SSD-LM"):
            export(result["checkpoint"], str(tmp_path / "exported"))
        return
    folder = export(result["checkpoint"], str(tmp_path / "exported"))
    with safe_open(folder / "model.safetensors", "pt") as archive:
        assert not any("objective" in name for name in archive.keys())  # noqa: SIM118
    assert (folder / "dlm_ray_objective.safetensors").exists() == bool(own)
    assert dlm_ray.load(folder).sample(length_tokens=3, steps=2)


def known(model):
    """What a loaded model knows, beside its weights: everything that decides how it is sampled, scored and served."""
    server = Server(checkpoint="x", name="x")
    card = RequestProcessor(model, Engine(model, server.engine), server).card()
    return {
        "sampling_target": model.sampling_target(),
        "objective": (
            type(model.objective),
            model.objective.likelihood,
            getattr(model.objective, "block_tokens", None),
        ),
        "learned": {name: tensor.tolist() for name, tensor in model.objective.state_dict().items()},
        "rules": model.rules,
        "sampling": model.sampling,
        "sequence_length": model.sequence_length,
        "document_mask": model.document_mask,
        "pattern": model.pattern,
        "shift": model.denoiser.shift,
        "mask_id": model.denoiser.mask_id,
        "tokenizer": model.tokenizer_identity,
        "card": card,
    }


def test_an_export_is_loaded_as_the_checkpoint_is(trained, data_folder, tmp_path):
    recipe, run_dir, result = trained
    if recipe.objective.name == "ssd_lm":
        return
    model, again = dlm_ray.load(run_dir), dlm_ray.load(export(result["checkpoint"], str(tmp_path / "exported")))
    assert known(again) == known(model)
    raw = export(result["checkpoint"], str(tmp_path / "raw"), weights="raw")
    assert known(dlm_ray.load(raw)) == known(dlm_ray.load(run_dir, "raw"))
    assert model.sequence_length == 32 < model.denoiser.network.config.max_position_embeddings
    assert (
        again.score(data_folder, draws_per_sequence=2).bits_per_byte
        == model.score(data_folder, draws_per_sequence=2).bits_per_byte
    )
    options = {"length_tokens": 8, "steps": 4, "seed": 1}
    for rule in model.rules:
        assert again.sample("the model", rule=rule, **options) == model.sample("the model", rule=rule, **options)


@pytest.mark.parametrize(
    "changes",
    [
        {"objective__name": "autoregressive", "sampling__top_p": 0.9},
        {"objective__name": "block", "objective__block_tokens": 32},
        {"objective__name": "genmd4", "data__document_mask": False, "ema": None},
        {
            "sampling": {"rule": "threshold", "threshold": 0.7, "temperature": 0.5, "steps": 7},
            "objective__shift": False,
        },
    ],
    ids=["autoregressive", "block-of-a-row", "raw-without-document-mask", "own-sampling"],
)
def test_an_export_keeps_what_the_recipe_says_of_sampling_and_documents(changes, data_folder, tmp_path):
    loop.fit(tiny_recipe(data_folder, "kept", training__steps=2, validation__sequences=0, **changes), tmp_path / "run")
    model, again = (
        dlm_ray.load(tmp_path / "run"),
        dlm_ray.load(export(str(tmp_path / "run"), str(tmp_path / "exported"))),
    )
    assert known(again) == known(model)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    ours = dict(model.denoiser.network.named_parameters())
    assert all(torch.equal(ours[name], parameter) for name, parameter in stock.named_parameters())
    if again.sampling_target().kind == "whole":
        assert again.infill("the", "row", length_tokens=3, seed=2) == model.infill(
            "the", "row", length_tokens=3, seed=2
        )


def test_a_run_that_starts_from_an_export_describes_itself(data_folder, tmp_path):
    recipe = tiny_recipe(
        data_folder,
        "first",
        objective__name="block",
        objective__block_tokens=8,
        training__steps=2,
        validation__sequences=0,
    )
    loop.fit(recipe, tmp_path / "first")
    base = str(export(str(tmp_path / "first"), str(tmp_path / "exported")))
    own = {"model__architecture": None, "model__base": base, "training__steps": 2, "validation__sequences": 0}
    loop.fit(tiny_recipe(data_folder, "second", **own), tmp_path / "second")
    again = dlm_ray.load(export(str(tmp_path / "second"), str(tmp_path / "exported-2")))
    assert again.sampling_target().kind == "whole" and type(again.objective) is Masked


def test_an_export_with_another_tokenizer_or_without_a_description_is_refused(data_folder, tmp_path):
    loop.fit(tiny_recipe(data_folder, "one", training__steps=2, validation__sequences=0), tmp_path / "run")
    folder = export(str(tmp_path / "run"), str(tmp_path / "exported"))
    config = json.loads((folder / "config.json").read_text())
    own = config.pop("dlm_ray")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is a diffusion model .* that does not describe its objective"):
        dlm_ray.load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "dlm_ray": {**own, "objective": "package.module:Own"}}))
    with pytest.raises(UserError, match="objective.name=package.module:Own: module package.module cannot be imported"):
        dlm_ray.load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "dlm_ray": own}))
    train_tokenizer(["another text"], 300).save_pretrained(folder)
    with pytest.raises(UserError, match="but its folder holds another one"):
        dlm_ray.load(folder)
