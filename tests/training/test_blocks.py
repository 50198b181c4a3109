"""A run of block diffusion.

Its curriculum over block sizes, its clip search, and what its checkpoint says of itself.
"""

import shutil

import numpy as np
import pytest
import torch
from helpers.recipes import tiny_recipe
from helpers.runs import losses, metrics

import dlm_ray
from dlm_ray.checkpoint import commit, listing
from dlm_ray.checkpoint.export import export
from dlm_ray.config.errors import UserError
from dlm_ray.diffusion.absorbing import Clip
from dlm_ray.diffusion.objectives import Autoregressive, Block
from dlm_ray.training import clip_search, curriculum, loop, setup


def block(data, name="blocks", block_tokens=4, **changes):
    return tiny_recipe(data, name, objective__name="block", objective__block_tokens=block_tokens, **changes)


STAGES = [{"block_tokens": 1, "steps": 2}, {"block_tokens": 32, "steps": 3}]


def test_block_sizes_come_in_order_and_end_at_the_objectives(data_folder, tmp_path):
    """LLaDA2.0's warm-up, stable and decay phases are stages.

    All the steps that are left are at `objective.block_tokens`.
    """
    recipe = block(data_folder, curriculum__block_sizes=STAGES)
    assert [curriculum.block_tokens(recipe, step) for step in range(8)] == [1, 1, 32, 32, 32, 4, 4, 4]
    assert curriculum.block_tokens(recipe, None) == 4
    result = loop.fit(recipe, tmp_path / "run")
    assert [line["block_tokens"] for line in metrics(tmp_path / "run") if "loss" in line] == [
        1,
        1,
        32,
        32,
        32,
        4,
        4,
        4,
    ]
    capabilities = commit.read_manifest(result["checkpoint"]).capabilities
    assert (capabilities["canvas"], capabilities["block_tokens"], capabilities["infill"]) == ("blocks", 4, False)


def test_the_future_within_a_block_is_annealed(data_folder):
    recipe = block(data_folder, block_tokens=8, curriculum__annealing={"pattern": "window", "steps": 4})
    documents = np.zeros((1, 32), dtype=np.int32)
    reach = [
        curriculum.visibility(recipe, False, step, documents, torch.device("cpu")).window_tokens for step in range(3)
    ]
    assert reach == [2, 4, 5]  # of the 7 later positions of a block of 8: a quarter, a half, three quarters
    assert curriculum.visibility(recipe, False, 3, documents, torch.device("cpu")).pattern == "bidirectional"


def test_adapting_an_ar_model_at_blocks_of_one_continues_it(data_folder, tmp_path):
    """With shift and every token masked, the first step of the adaptation is the AR model's own next step, to the last
    bit.
    """
    loop.fit(tiny_recipe(data_folder, "base", objective__name="autoregressive"), tmp_path / "base")
    common = {
        "model__architecture": None,
        "model__base": str(tmp_path / "base"),
        "training__steps": 2,
        "validation__sequences": 0,
    }
    loop.fit(tiny_recipe(data_folder, "ar", objective__name="autoregressive", **common), tmp_path / "ar")
    loop.fit(block(data_folder, "one", 1, objective__mask_sampler="count", **common), tmp_path / "one")
    assert losses(tmp_path / "ar") == losses(tmp_path / "one")
    network = dlm_ray.load(tmp_path / "one").denoiser
    assert network.mask_id is not None


def test_the_clip_search_replaces_the_clip_and_a_resumed_run_keeps_it(data_folder, tmp_path):
    recipe = block(
        data_folder,
        training__steps=12,
        checkpoint__every_steps=6,
        curriculum__clip_search={"every_steps": 4, "sequences": 6, "draws": 2},
    )
    result = loop.fit(recipe, tmp_path / "run")
    found = [(line["step"], line["clip_search"]) for line in metrics(tmp_path / "run") if "clip_search" in line]
    assert [step for step, _ in found] == [4, 8]
    for _, candidates in found:
        assert len(candidates) == 36
        variances = [one["variance"] for one in candidates]
        assert variances == sorted(variances) and variances[0] < variances[-1]
    manifest = commit.read_manifest(result["checkpoint"])
    assert manifest.extra["clip"] == [found[-1][1][0]["beta"], found[-1][1][0]["omega"]]
    # From step 6 on again: the clip of step 4 is in force, and the search of step 8 gives what it gave.
    shutil.rmtree(result["checkpoint"])
    assert listing.latest(str(tmp_path / "run")).endswith("6")
    again = loop.fit(recipe, tmp_path / "run")
    assert {name: value for name, value in again.items() if name in ("loss", "gradient_norm")} == {
        name: result[name] for name in ("loss", "gradient_norm")
    }


def test_no_clip_is_searched_while_another_block_size_is_trained(data_folder, tmp_path):
    """It is measured at `objective.block_tokens`.

    A stage at another size would be trained on an interval that was found for this one.
    """
    recipe = block(
        data_folder, curriculum={"block_sizes": STAGES, "clip_search": {"every_steps": 1, "sequences": 2, "draws": 1}}
    )
    assert [step for step in range(1, 9) if clip_search.is_due(recipe, step)] == [
        5,
        6,
        7,
        8,
    ]  # before the steps that are at 4 tokens
    loop.fit(recipe, tmp_path / "run")
    assert [line["step"] for line in metrics(tmp_path / "run") if "clip_search" in line] == [5, 6, 7]


def test_the_search_changes_the_draws_of_the_steps_behind_it(data_folder):
    recipe = block(data_folder, objective__clip={"beta": 0.001, "omega": 1.0, "weight": "paper", "enforce": "counts"})
    objective = Block(block_tokens=4)
    clip_search.apply(recipe, objective, [0.45, 0.95])
    assert objective.process.clip == Clip(0.45, 0.95, "paper", "counts")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"block_tokens": 5},
            "objective.block_tokens=5 does not divide the sequence length 32; allowed are 1, 2, 4, 8, 16, 32",
        ),
        (
            {"curriculum__block_sizes": [{"block_tokens": 12, "steps": 1}]},
            "curriculum.block_sizes.0.block_tokens=12 does not divide",
        ),
    ],
)
def test_blocks_have_to_tile_a_row(data_folder, changes, message):
    recipe = block(data_folder, **changes)
    network = setup.Network({"vocab_size": 30, "hidden_size": 8}, 29, True, False)
    with pytest.raises(UserError) as error:
        setup.build_objective(recipe, network, 32)
    assert message in str(error.value)


def test_a_loaded_or_exported_checkpoint_knows_its_block_size(data_folder, tmp_path):
    result = loop.fit(block(data_folder, training__steps=2, validation__sequences=0), tmp_path / "run")
    assert dlm_ray.load(tmp_path / "run").objective.block_tokens == 4
    exported = dlm_ray.load(export(result["checkpoint"], str(tmp_path / "exported")))
    assert exported.objective.block_tokens == 4
    ours = dlm_ray.load(tmp_path / "run").bits_per_byte(data_folder, max_sequences=4)["bits_per_byte"]
    assert exported.bits_per_byte(data_folder, max_sequences=4)["bits_per_byte"] == pytest.approx(ours)
    # A run that starts from it and is of another kind says what it is.
    changed = tiny_recipe(
        data_folder, "ar", model__architecture=None, model__base=str(tmp_path / "run"), objective__name="autoregressive"
    )
    loop.fit(changed, tmp_path / "ar")
    assert isinstance(dlm_ray.load(tmp_path / "ar").objective, Autoregressive)
    assert "block_tokens" not in commit.read_manifest(listing.latest(str(tmp_path / "ar"))).model["config"]
