"""Asynchronous checkpoints.

The training goes on while one is written, and what is written is the state of its own step.
"""

import threading

import pytest
from helpers.recipes import tiny_recipe
from helpers.runs import assert_equal_tensors, checkpoint_tensors, metrics

from dlm_ray.checkpoint import commit, listing
from dlm_ray.training import loop

pytestmark = pytest.mark.long


def test_training_goes_on_while_a_checkpoint_is_written_which_holds_its_own_step(data_folder, tmp_path, monkeypatch):
    """The write of step 4 begins when step 6 has been taken.

    Without a copy it would hold that, without a thread it would never begin.
    """
    recipe = tiny_recipe(data_folder, "behind", training__steps=8, checkpoint__every_steps=4, checkpoint__keep_last=9)
    loop.fit(
        recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"asynchronous": False})}),
        tmp_path / "waits",
    )

    two_more, written_after = threading.Event(), []
    taken, step, write = [], loop.train_step, commit._write_blocks

    def counted(*arguments, **options):
        result = step(*arguments, **options)
        taken.append(None)
        if len(taken) >= 6:
            two_more.set()
        return result

    def late(*arguments):
        assert two_more.wait(60), "the training waits for the write"
        written_after.append(len(taken))
        return write(*arguments)

    monkeypatch.setattr(loop, "train_step", counted)
    monkeypatch.setattr(commit, "_write_blocks", late)
    loop.fit(recipe, tmp_path / "goes-on")
    assert written_after[0] >= 6
    for number in (4, 8):
        assert_equal_tensors(
            *(checkpoint_tensors(listing.step_directory(str(tmp_path / name), number)) for name in ("waits", "goes-on"))
        )


def test_a_run_that_fails_while_a_checkpoint_is_written_leaves_it_whole_or_not_at_all(
    data_folder, tmp_path, monkeypatch
):
    """And nothing is written behind its back once it has ended."""
    step, taken = loop.train_step, []

    def fails(*arguments, **options):
        taken.append(None)
        if len(taken) == 6:
            raise OSError("the machine next door is on fire")
        return step(*arguments, **options)

    before, begun, write = threading.active_count(), threading.Event(), commit._write_blocks

    def slow(*arguments):
        begun.set()
        return write(*arguments)

    monkeypatch.setattr(loop, "train_step", fails)
    monkeypatch.setattr(commit, "_write_blocks", slow)
    recipe = tiny_recipe(data_folder, "burns")
    try:
        loop.fit(recipe, tmp_path / "run")
    except OSError as error:
        assert "on fire" in str(error)
    assert begun.is_set() and threading.active_count() <= before + 1
    assert listing.committed_steps(str(tmp_path / "run")) == [4]
    assert commit.verify(listing.latest(str(tmp_path / "run"))) == []


def test_the_metrics_say_how_long_each_save_held_the_training_up(data_folder, tmp_path):
    loop.fit(tiny_recipe(data_folder, "said"), tmp_path / "run")
    saves = [event for event in metrics(tmp_path / "run") if "of_step" in event]
    assert [save["of_step"] for save in saves] == [4, 8] and all(0 < save["blocked_seconds"] < 60 for save in saves)
    assert saves[-1]["checkpoint"] == listing.latest(str(tmp_path / "run"))
