"""The clip search on a checkpoint: 36 candidates, the files that it writes, and what it refuses."""

import json

import pytest
from dlm_ray.evaluation.sweeps import clip_search
from helpers import commands
from helpers.recipes import tiny_recipe

import dlm_ray
from dlm_ray.config.errors import UserError
from dlm_ray.training import loop


@pytest.fixture(scope="module")
def checkpoint(data_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "run"
    loop.fit(tiny_recipe(data_folder, "masked", training__steps=30, validation__sequences=0), folder)
    return str(folder)


def test_the_command_prints_candidates_and_writes_a_table_and_a_heat_map(checkpoint, data_folder, tmp_path):
    options = ["--data", data_folder, "--block-tokens", 4, "--sequences", 6, "--draws", 2, "--out", tmp_path / "out"]
    done = commands.dlm_ray("sweep", "clip-search", checkpoint, *options, "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert len(printed["candidates"]) == 36 and printed["block_tokens"] == 4
    variances = [candidate["variance"] for candidate in printed["candidates"]]
    assert variances == sorted(variances)
    written = json.loads((tmp_path / "out/clip_search.json").read_text())
    assert written["candidates"] == printed["candidates"]
    picture = (tmp_path / "out/clip_search.svg").read_text()
    assert "omega" in picture and "K = 4" in picture


def test_gradient_variances_are_measured_for_every_candidate(checkpoint, data_folder):
    few = {"num_sequences": 4, "num_draws": 1, "num_gradients": 2, "gradient_sequences": 4}
    candidates = clip_search.search(dlm_ray.load(checkpoint), data_folder, 8, **few)
    assert len(candidates) == 36 and all(candidate.gradient_variance > 0 for candidate in candidates)


@pytest.mark.parametrize(
    ("block_tokens", "message"),
    [
        (5, "block_tokens=5: must be one of 2, 4, 8, 16, 32 for sequences of 32 tokens"),
        (1, "train blocks of 1 with objective.mask_sampler=count"),
    ],
)
def test_block_sizes_that_cannot_be_searched_are_refused(checkpoint, data_folder, block_tokens, message):
    with pytest.raises(UserError, match=message):
        clip_search.search(dlm_ray.load(checkpoint), data_folder, block_tokens)


def test_an_autoregressive_model_is_refused(data_folder, tmp_path):
    loop.fit(tiny_recipe(data_folder, "ar", objective__name="autoregressive", training__steps=2), tmp_path / "run")
    with pytest.raises(UserError, match="autoregressive"):
        clip_search.search(dlm_ray.load(tmp_path / "run"), data_folder, 4)
