"""Every file of a checkpoint is needed, and damage to any of them is found.

By verifying, by loading, and by going on from it.
"""

import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers.recipes import tiny_recipe
from helpers.victim import group

from dlm_ray.checkpoint import commit, listing
from dlm_ray.config.errors import DamageError

pytestmark = pytest.mark.long

KINDS = ("flip", "flip", "truncate", "delete")


@pytest.fixture(scope="module")
def checkpoint(data_folder, tmp_path_factory):
    """The last checkpoint of a run on two ranks, with its optimizer and averages, and a tensor of several chunks beside
    it.
    """
    run_dir = tmp_path_factory.mktemp("damage") / "run"
    recipe = tiny_recipe(
        data_folder, "damage", model__architecture__width=64, training__steps=4, checkpoint__every_steps=4
    )
    assert group(recipe, run_dir, 2) == [0, 0]
    return Path(listing.latest(str(run_dir)))


def blank(manifest):
    from dlm_ray.checkpoint.arrays import TORCH_DTYPES

    return {name: torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype]) for name, entry in manifest.arrays.items()}


def damage(path, kind, rng):
    """Changes one bit of a file, cuts it anywhere, or removes it."""
    content = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def check(number, checkpoint, tmp_path):
    rng = random.Random(number)
    manifest = commit.read_manifest(str(checkpoint))
    files = sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    # Half of them anywhere in the bytes, half in any of the files, of which most are small.
    sizes = [(copy / name).stat().st_size for name in files]
    victim = copy / (rng.choices(files, sizes)[0] if number % 2 else rng.choice(files))
    kind = rng.choice(KINDS)
    damage(victim, kind, rng)
    with pytest.raises(DamageError) as failure:
        commit.load(str(copy), blank(manifest))
    errors = commit.verify(str(copy))
    assert errors, f"{kind} of {victim.relative_to(copy)} was not found by verify"
    for said in (str(failure.value), errors[0]):
        speaks_of_all = victim.name == "manifest.json" or "the index of all tensors" in said
        assert str(victim) in said or ("manifest.json" in said and speaks_of_all), (
            f"{kind} of {victim.relative_to(copy)}: {said}"
        )
        assert speaks_of_all or any(name in said for name in manifest.arrays), (
            f"{kind} of {victim.relative_to(copy)}: {said}"
        )


def test_nothing_lies_in_a_checkpoint_that_is_not_needed(checkpoint):
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert files == {*commit.read_manifest(str(checkpoint)).files, "manifest.json"}
    assert any(name.startswith("ocdbt.process_1/") for name in files) and not any(
        "process" in name and "manifest" in name for name in files
    )
    assert commit.verify(str(checkpoint)) == []


@pytest.mark.parametrize("number", range(16))
def test_damage_is_found_by_verifying_and_by_loading_and_named(number, checkpoint, tmp_path):
    check(number, checkpoint, tmp_path)


@pytest.mark.faults
@pytest.mark.parametrize("number", range(1000, 1200))
def test_two_hundred_damages_are_found_by_verifying_and_by_loading_and_named(number, checkpoint, tmp_path):
    check(number, checkpoint, tmp_path)


def test_a_run_does_not_go_on_from_a_damaged_checkpoint(checkpoint, data_folder, tmp_path):
    """And says so in every rank, as one failure."""
    shutil.copytree(checkpoint, tmp_path / "run" / checkpoint.name)
    victim = max((tmp_path / "run").glob("step_*/ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)
    recipe = tiny_recipe(
        data_folder, "damage", model__architecture__width=64, training__steps=4, checkpoint__every_steps=4
    )
    assert group(recipe, tmp_path / "run", 2) == [1, 1]
    said = [(tmp_path / f"run.error{rank}").read_text() for rank in (0, 1)]
    assert any(str(victim) in one for one in said), said
