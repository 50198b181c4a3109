"""A disk that is full.

Said before a save if it can be known, and during one; the checkpoint before stays, and the run does as its recipe says.
"""

import resource
import subprocess

import pytest
import torch
from helpers.recipes import tiny_recipe
from helpers.runs import assert_same_tensors, metrics

from dlm_ray.checkpoint import commit, listing
from dlm_ray.config.errors import DamageError
from dlm_ray.training import loop

pytestmark = pytest.mark.long

FIELDS = {"step": 3, "recipe": {}, "tokenizer": {}, "model": {}, "capabilities": {}, "cursor": {}, "extra": {}}


@pytest.fixture
def full_at_save(monkeypatch):
    """No file of this process grows beyond 20 kB while the saves of these numbers write: what a quota does to one."""
    original, calls = commit._write_blocks, []

    def arm(*numbers):
        def write(*arguments):
            calls.append(None)
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            if len(calls) in numbers:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            try:
                return original(*arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        monkeypatch.setattr(commit, "_write_blocks", write)

    return arm


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_stops_the_run_and_the_checkpoint_before_is_what_it_goes_on_from(
    full_at_save, data_folder, tmp_path, asynchronous
):
    recipe = tiny_recipe(data_folder, "full", training__steps=12, checkpoint__asynchronous=asynchronous)
    full_at_save(2)
    with pytest.raises(
        DamageError, match=r"step_00000008: \S+: no space left .*File too large.* the previous checkpoint is intact"
    ):
        loop.fit(recipe, tmp_path / "run")
    assert listing.committed_steps(str(tmp_path / "run")) == [4] and not (tmp_path / "run/step_00000008").exists()
    assert commit.verify(listing.latest(str(tmp_path / "run"))) == []
    assert loop.fit(recipe, tmp_path / "run")["step"] == 12
    assert_is_the_run_that_had_room(recipe, tmp_path)


def test_a_full_disk_is_gone_past_if_the_recipe_says_so(full_at_save, data_folder, tmp_path, caplog):
    recipe = tiny_recipe(data_folder, "full", training__steps=12, checkpoint__on_failed_save="continue")
    full_at_save(2)
    reported = []
    loop.fit(recipe, tmp_path / "run", report=lambda metrics, directory: reported.append(metrics["step"]))
    assert reported == [4, 12] and "the checkpoint of step 8 failed, and the run continues without it" in caplog.text
    assert [event["checkpoint"] is None for event in metrics(tmp_path / "run") if "of_step" in event] == [
        False,
        True,
        False,
    ]
    assert_is_the_run_that_had_room(recipe, tmp_path)


def test_the_last_checkpoint_has_to_succeed(full_at_save, data_folder, tmp_path):
    full_at_save(2)
    with pytest.raises(DamageError, match="no space left"):
        loop.fit(tiny_recipe(data_folder, "full", checkpoint__on_failed_save="continue"), tmp_path / "run")
    assert listing.committed_steps(str(tmp_path / "run")) == [4]


def assert_is_the_run_that_had_room(recipe, tmp_path):
    loop.fit(recipe, tmp_path / "roomy")
    assert_same_tensors(tmp_path / "roomy", tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs the rights for it; RLIMIT_FSIZE stands for it in the other tests")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_room_is_looked_for_before_anything_is_written(small_disk):
    commit.save(str(small_disk / "step_00000001"), {"a": torch.randn(2**18)}, FIELDS)
    with pytest.raises(
        DamageError,
        match=r"no space left for a checkpoint of 9 MiB, the disk has 7 MiB free; free some, or lower "
        r"checkpoint.keep_last",
    ):
        commit.save(str(small_disk / "step_00000002"), {"a": torch.randn(2**21)}, FIELDS)
    assert listing.committed_steps(str(small_disk)) == [1] and commit.verify(str(small_disk / "step_00000001")) == []


def test_a_disk_that_fills_up_while_a_save_writes_leaves_the_checkpoint_before(small_disk, monkeypatch):
    commit.save(str(small_disk / "step_00000001"), {"a": torch.randn(2**18)}, FIELDS)
    original = commit._write_blocks

    def filled(*arguments):
        (small_disk / "somebody-else").write_bytes(bytes(6 * 2**20))
        return original(*arguments)

    monkeypatch.setattr(commit, "_write_blocks", filled)
    with pytest.raises(DamageError, match=r"step_00000002: a: no space left .*No space left on device"):
        commit.save(str(small_disk / "step_00000002"), {"a": torch.randn(2**20)}, FIELDS)
    assert listing.committed_steps(str(small_disk)) == [1] and commit.verify(str(small_disk / "step_00000001")) == []
