"""A run that is killed at any moment is the run that was not.

SIGKILL inside every stage of it, and the same bits at the end.
"""

from pathlib import Path

import pytest
from helpers.recipes import tiny_recipe
from helpers.runs import assert_same_run, tensors
from helpers.victim import MOMENTS, group, seeded

from dlm_ray.checkpoint import commit, listing

pytestmark = pytest.mark.long

STEPS, EVERY = 16, 4


def recipe_of(data):
    changes = {"training__steps": STEPS, "checkpoint__every_steps": EVERY, "validation__every_steps": 8}
    return tiny_recipe(data, "killed", **changes)


@pytest.fixture(scope="module")
def uninterrupted(data_folder, tmp_path_factory):
    """By number of ranks: the directory of a run that nothing happened to."""
    known = {}

    def run(num_ranks):
        if num_ranks not in known:
            known[num_ranks] = tmp_path_factory.mktemp("whole") / f"on-{num_ranks}"
            assert group(recipe_of(data_folder), known[num_ranks], num_ranks) == [0] * num_ranks
        return known[num_ranks]

    return run


def check(number, data_folder, uninterrupted, tmp_path):
    num_ranks, death = seeded(number, STEPS, STEPS // EVERY, tmp_path / "marker")
    whole, run_dir = uninterrupted(num_ranks), tmp_path / "run"
    codes = group(recipe_of(data_folder), run_dir, num_ranks, death=death)
    assert codes[death.rank] == -9 and Path(death.marker).read_text() == death.moment, f"{death}: {codes}"
    assert 0 not in codes, f"{death}: a rank finished without the one that died: {codes}"
    for step in listing.committed_steps(str(run_dir)):
        assert commit.verify(listing.step_directory(str(run_dir), step)) == [], f"{death}: step {step} was believed"
    assert group(recipe_of(data_folder), run_dir, num_ranks) == [0] * num_ranks, f"{death}: it did not go on"
    assert_same_run(whole, run_dir)
    assert any(name.startswith("optimizer.") for name in tensors(run_dir))


@pytest.mark.parametrize("number", [7, 8, 9, 16, 11], ids=lambda number: f"{MOMENTS[number % 6]}-{number}")
def test_a_killed_run_ends_bit_for_bit_as_the_run_that_was_not(number, data_folder, uninterrupted, tmp_path):
    check(number, data_folder, uninterrupted, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("number", range(100, 120), ids=lambda number: f"{MOMENTS[number % 6]}-{number}")
def test_twenty_killed_runs_end_bit_for_bit_as_the_run_that_was_not(number, data_folder, uninterrupted, tmp_path):
    check(number, data_folder, uninterrupted, tmp_path)
