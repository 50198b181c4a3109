"""Sweep files: the trials and corners of a space, and every mistake before anything starts."""

import json
import math
import random

import pytest
import yaml
from helpers.commands import dlm_ray

from dlm_ray.config import space
from dlm_ray.config.errors import UserError
from dlm_ray.config.load import shipped_sweeps
from dlm_ray.config.sweep import Sweep
from dlm_ray.config.sweep_load import load_sweep, start_recipe

CLIPS = {
    "by": "objective.block_tokens",
    "cases": {4: {"grid": [None, {"beta": 0.45, "omega": 0.95}]}, 16: {"grid": [{"beta": 0.3, "omega": 0.8}]}},
}
BLOCKS = {
    "objective.name": {"grid": ["block"]},
    "objective.block_tokens": {"grid": [4, 16, 32]},
    "objective.clip": CLIPS,
}
RATE = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}}


def load(tmp_path, typed=(), **fields):
    path = tmp_path / "sweep.yaml"
    path.write_text(
        yaml.safe_dump({"name": "s", "recipe": "quickstart_own", "space": BLOCKS, **fields}, sort_keys=False)
    )
    return load_sweep(str(path), typed)


def test_a_grid_is_every_combination_and_a_case_applies_to_its_value_only(tmp_path):
    found = space.trials(load(tmp_path).sweep)
    assert [(one["objective.block_tokens"], one.get("objective.clip", "as the recipe")) for one in found] == [
        (4, None),
        (4, {"beta": 0.45, "omega": 0.95}),
        (16, {"beta": 0.3, "omega": 0.8}),
        (32, "as the recipe"),
    ]


def test_a_trial_is_the_recipe_with_its_settings_applied(tmp_path):
    loaded = load(tmp_path, ["training.steps=300", "trials_at_once=2"], overrides=["seed=7"])
    recipe = loaded.recipe(space.trials(loaded.sweep)[1])
    assert (recipe.objective.block_tokens, recipe.objective.clip.beta, recipe.seed, recipe.training.steps) == (
        4,
        0.45,
        7,
        300,
    )
    assert recipe.tracking.group == "s" and loaded.sweep.trials_at_once == 2
    assert (
        loaded.recipe({"objective.name": "masked", "curriculum.annealing": None}).curriculum.annealing.pattern == "none"
    )


def test_random_trials_cover_every_grid_stay_in_range_and_depend_on_the_seed(tmp_path):
    rates = {"uniform": [0.0, 0.2], "choice": [0.1, 0.2]}
    spaces = {
        **RATE,
        "optimizer.weight_decay": {"uniform": rates["uniform"]},
        "seed": {"grid": [0, 1]},
        "objective.shift": {"choice": [True, False]},
    }
    searches = [{"name": "random", "trials": 20, "seed": seed} for seed in (0, 0, 1)]
    first, again, other = (space.trials(load(tmp_path, space=spaces, search=search).sweep) for search in searches)
    assert first == again != other and len(first) == 40
    assert all(
        1e-4 <= one["optimizer.learning_rate"] <= 1e-2 and 0 <= one["optimizer.weight_decay"] <= 0.2 for one in first
    )
    assert (
        sum(one["optimizer.learning_rate"] < 1e-3 for one in first) > 10
    )  # log-uniform: half below the geometric mean
    assert {one["objective.shift"] for one in first} == {True, False} and sum(one["seed"] for one in first) == 20


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": {}}, "space is empty: there is nothing to try"),
        ({"space": {"objective.block_tokens": {"grid": []}}}, r"space.objective.block_tokens.grid is empty"),
        ({"space": {"objective.blok_tokens": {"grid": [4]}}},
         r"recipes have no key objective.blok_tokens; did you mean objective.block_tokens"),
        ({"space": {"optimiser.learning_rate": {"grid": [1e-4]}}}, r"did you mean optimizer.learning_rate\?"),
        ({"space": {"seed": {"grid": [1], "choice": [2]}}},
         "exactly one of grid, choice, uniform, loguniform and cases is needed, and it has grid, choice"),
        ({"space": {"optimizer.learning_rate": {"loguniform": [0, 1]}}, "search": {"name": "random", "trials": 1}},
         "0 < low < high"),
        ({"space": {**BLOCKS, "objective.clip": {"by": "objective.blocks", "cases": {4: {"grid": [None]}}}}},
         "allowed are the keys of the space with"),
        ({"space": {**BLOCKS, "objective.clip": {**CLIPS, "cases": {5: {"grid": [None]}}}}},
         "cases.5 is not a value of objective.block_tokens; allowed are 4, 16, 32"),
        ({"space": {"seed": {"grid": [1, 2, 1]}}}, "space.seed.grid has 1 twice: the same trial would run again"),
        ({"space": {**BLOCKS, "objective.clip": {**CLIPS, "cases": {4: {"grid": [None, None]}}}}},
         "space.objective.clip.cases.4.grid has null twice"),
        ({"space": {"training.steps": {"uniform": [200, 400]}}, "search": {"name": "random", "trials": 1}},
         "training.steps=323.6.*valid integer"),
        ({"overrides": ["training.steps=null"], "scheduler": {"name": "asha", "min_tokens": 1000}},
         "training.steps is missing"),
        ({"space": RATE}, "search.name=grid tries every value, and optimizer.learning_rate have no grid"),
        ({"search": {"name": "random", "trials": 3}}, "nothing to sample, because every key of the space is a grid"),
        ({"metric": "perplexity"},
         "metric='perplexity'; allowed are 'bits_per_byte', 'nelbo_variance', 'gradient_variance' or 'tokens_per_s"),
        ({"metric": "gradient_variance"}, "not measured with measure.gradient_draws=0"),
        ({"metric": "tokens_per_second"}, "mode=min with metric=tokens_per_second, whose max is best"),
        ({"space": {"objective.name": {"grid": ["autoregressive"]}}, "overrides": ["curriculum={}"],
          "metric": "nelbo_variance"},
         "is never reported for objective.name=autoregressive"),
        ({"overrides": ["validation.sequences=0"], "scheduler": {"name": "asha", "min_tokens": 1000}},
         "validation.sequences=0, so the bound .* never reported"),
        ({"scheduler": {"name": "asha"}}, "scheduler.min_tokens=0 with scheduler.name=asha"),
        ({"scheduler": {"name": "pbt", "every_steps": 60}}, "nothing to perturb"),
        ({"scheduler": {"name": "pbt", "every_steps": 70}, "space": RATE, "search": {"name": "random", "trials": 4}},
         "multiples of validation.every_steps=60"),
        ({"scheduler": {"name": "pbt", "every_steps": 60}, "space": {"objective.shift": {"choice": [True, False]}},
          "search": {"name": "random", "trials": 4}},
         "would change in the middle"),
        ({"rank_by": "seed"},
         "rank_by=seed; allowed are the keys of the space with grid or choice: objective.name, objective.block_tokens"),
        ({"scheduling": {}}, r"scheduling is unknown; did you mean scheduler\?"),
        ({"scheduler": {"min_token": 3}}, r"scheduler.min_token is unknown; did you mean scheduler.min_tokens\?"),
        ({"recipe": "quickstrat"}, "there is no recipe 'quickstrat'"),
        ({"confirm": {"overrides": ["training.step=9"]}}, r"training.step is unknown; did you mean training.steps\?"),
    ],)  # fmt: skip
def test_a_mistake_is_reported_with_what_is_allowed(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, **fields)


def test_a_sampled_value_stays_within_its_range(tmp_path, monkeypatch):
    """exp(log(high)) may be larger than high."""
    leaf = load(tmp_path, space=RATE, search={"name": "random", "trials": 1}).sweep.space["optimizer.learning_rate"]
    for end, beyond in ((0, 0.5), (1, 2.0)):
        monkeypatch.setattr(space.math, "exp", lambda value, beyond=beyond: beyond * math.e**value)
        rng = random.Random(0)
        rng.uniform = lambda low, high, end=end: (low, high)[end]
        assert space.sample(leaf, rng) == leaf.range[end]


def test_paths_and_settings_may_contain_any_characters(tmp_path):
    loaded = load(tmp_path, corpus={}, start_from={"recipe": "quickstart_base"})
    data, base = "/tmp/a, b: {c} #d/'e'", '/tmp/x: "y" [z]'
    recipe = loaded.recipe({}, data, base)
    assert (recipe.data.sources[0].path, recipe.model.base) == (data, base)
    assert start_recipe(loaded.sweep, data).data.sources[0].path == data
    tree, problems = space.apply(loaded.tree, {"model.base": "d\u00fc \U0001f600"})
    assert tree["model"]["base"] == "d\u00fc \U0001f600" and problems == []


def test_every_corner_must_be_a_valid_recipe_and_a_shared_mistake_is_reported_once(tmp_path):
    steps = {"training.steps": {"choice": [100, 300]}, **RATE, "curriculum.annealing.steps": {"choice": [72, 200]}}
    with pytest.raises(UserError) as error:
        load(
            tmp_path, space=steps, search={"name": "random", "trials": 1}, overrides=["curriculum.annealing.share=null"]
        )
    assert str(error.value).count("curriculum.annealing.steps=200 exceeds training.steps=100") == 1
    wide = {f"data.sources.{number}.weight": {"grid": [1, 2]} for number in range(13)}
    with pytest.raises(UserError, match="more than 5000 corners"):
        load(tmp_path, space=wide)


def test_an_unknown_sweep_is_refused_with_similar_names():
    with pytest.raises(UserError, match="there is no sweep 'clip_by_blok'.*near: .*clip_by_block"):
        load_sweep("clip_by_blok")


def test_the_schema_of_a_sweep_is_printed():
    printed = json.loads(dlm_ray("schema", "sweep").stdout)
    assert printed["title"] == "Sweep" and set(printed["properties"]) == set(Sweep.model_fields)


@pytest.mark.parametrize("name", sorted(shipped_sweeps()))
def test_a_shipped_sweep_is_valid_at_every_corner_and_named_as_its_file(name):
    sweep = load_sweep(name).sweep
    assert sweep.name == name.rpartition("/")[2] + ("_laptop" if "laptop/" in name else "")
    assert len(space.trials(sweep)) > 1


def test_every_shipped_sweep_has_a_laptop_variant_of_the_same_question():
    full = [name for name in shipped_sweeps() if "laptop/" not in name]
    assert len(full) == 4
    for name in full:
        one, small = load_sweep(name).sweep, load_sweep(name.replace("sweeps/", "sweeps/laptop/")).sweep
        assert (one.metric, one.rank_by, one.scheduler.name, one.search.name) == (
            small.metric,
            small.rank_by,
            small.scheduler.name,
            small.search.name,
        )
        assert set(small.space) <= set(one.space) and small.corpus is not None and small.start_from is not None
