"""What a run may go past.

A gradient that is not finite, a row that cannot be read. Counted in every checkpoint, and the same after a resume.
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.recipes import tiny_recipe
from helpers.runs import assert_same_tensors, metrics, tensors

from dlm_ray.checkpoint import commit, listing
from dlm_ray.config.errors import DamageError
from dlm_ray.config.load import validate
from dlm_ray.config.recipe import Source
from dlm_ray.data.index import load_index
from dlm_ray.data.order import Cursor, Order
from dlm_ray.data.reading import ShardReader, read_split
from dlm_ray.diffusion.denoiser import LossSum
from dlm_ray.diffusion.objectives import Masked
from dlm_ray.training import loop
from dlm_ray.training.ema import Ema
from dlm_ray.training.faults import LossAlarm

pytestmark = pytest.mark.long

BAD_STEPS = set()


class OverflowsAt(Masked):
    """An objective of somebody's own whose loss is infinite at the steps in BAD_STEPS, counted from 1."""

    def draw(self, key, x_0, maskable):
        self.is_bad = key.step + 1 in BAD_STEPS
        return super().draw(key, x_0, maskable)

    def forward(self, denoiser, batch):
        result = super().forward(denoiser, batch)
        return LossSum(result.weighted_sum * (math.inf if self.is_bad else 1.0))


@pytest.fixture
def bad_steps():
    BAD_STEPS.clear()
    yield BAD_STEPS
    BAD_STEPS.clear()


def recipe_of(data, **changes):
    return tiny_recipe(data, "bad", objective__name=f"{__name__}:OverflowsAt", training__steps=12, **changes)


def test_steps_that_are_not_finite_are_left_out_and_counted_and_a_resume_counts_on(bad_steps, data_folder, tmp_path):
    bad_steps |= {3, 6, 7}
    recipe = recipe_of(data_folder, training__max_skipped_steps=2)
    loop.fit(recipe, tmp_path / "run")
    manifest = commit.read_manifest(listing.latest(str(tmp_path / "run")))
    assert manifest.extra["faults"]["skipped_steps"] == 3 and manifest.step == 12
    assert all(torch.isfinite(tensor.double()).all() for tensor in tensors(tmp_path / "run").values())
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/step_00000012")  # it goes on at step 8, behind the three
    loop.fit(recipe, tmp_path / "cut")
    assert_same_tensors(tmp_path / "run", tmp_path / "cut")


def test_the_warm_up_of_the_average_counts_updates_and_not_steps_that_are_left_out(
    bad_steps, data_folder, tmp_path, monkeypatch
):
    bad_steps |= {1, 2, 6}
    numbers, update = [], Ema.update
    monkeypatch.setattr(Ema, "update", lambda ema, number: numbers.append(number) or update(ema, number))
    recipe = recipe_of(data_folder, training__max_skipped_steps=2)
    loop.fit(recipe, tmp_path / "run")
    assert numbers == list(range(9))
    shutil.rmtree(tmp_path / "run/step_00000012")
    loop.fit(recipe, tmp_path / "run")
    assert numbers == [*range(9), 5, 6, 7, 8]  # from step 8 on, before which three were left out


def test_a_step_that_is_left_out_changes_nothing_at_all(bad_steps, data_folder, tmp_path):
    """Weights, moments, bias correction and average after it are those before it."""
    bad_steps |= {4}
    recipe = recipe_of(data_folder, training__max_skipped_steps=1, checkpoint__every_steps=1, checkpoint__keep_last=12)
    loop.fit(recipe, tmp_path / "run")
    for name in commit.read_manifest(str(tmp_path / "run/step_00000003")).arrays:
        before, after, later = (
            commit.read_tensor(str(tmp_path / f"run/step_0000000{step}"), name) for step in (3, 4, 5)
        )
        assert torch.equal(before, after), name
        assert not torch.equal(after, later) or not after.any(), name


def test_one_more_in_a_row_ends_the_run_with_a_file_that_leads_to_the_step(bad_steps, data_folder, tmp_path):
    bad_steps |= {6, 7, 8}
    recipe = recipe_of(data_folder, training__max_skipped_steps=2)
    with pytest.raises(
        FloatingPointError,
        match=r"step 8 \(sequences 84 to 95 .* the last checkpoint is valid, and \S+bad_step_00000008.json holds",
    ):
        loop.fit(recipe, tmp_path / "run")
    last = listing.latest(str(tmp_path / "run"))
    assert commit.read_manifest(last).step == 4 and commit.verify(last) == []

    file = json.loads((tmp_path / "run/bad_step_00000008.json").read_text())
    assert file["checkpoint"] == last and file["step"] == 8 and file["metrics"]["loss"] == "inf"
    assert file["draw"] == {"seed": 0, "step": 7, "global_batch_size": 12}
    # The recipe in it is the run's, and from its checkpoint it comes to the same step with the same end.
    assert validate(file["recipe"], "file") == recipe
    index = load_index(data_folder)
    references, _ = Order([index], [1.0], 0, recipe.data.window_shards).references(Cursor.from_dict(file["cursor"]), 12)
    shards = index.splits["train"].shards
    assert file["sequences"] == [
        {"source": data_folder, "shard": shards[one.shard].file, "sequence": one.sequence} for one in references
    ]
    with pytest.raises(FloatingPointError, match="step 8 "):
        loop.fit(recipe, tmp_path / "run")
    bad_steps.clear()
    assert loop.fit(recipe, tmp_path / "run")["step"] == 12


def test_a_loss_far_above_those_before_it_rings():
    alarm = LossAlarm(8.0, [])
    rng = np.random.default_rng(0)
    assert not any(alarm.is_spike(step, 3.0 + 0.1 * rng.standard_normal()) for step in range(60))
    assert alarm.is_spike(60, 5.0) and not alarm.is_spike(61, 3.1)
    assert alarm.is_spike(62, math.nan) and not alarm.is_spike(63, 2.0)  # falling is no alarm
    assert not LossAlarm(0.0, [3.0] * 50).is_spike(1, 100.0)


def test_a_spike_is_logged_with_the_step_and_the_alarm_knows_the_losses_before_a_resume(data_folder, tmp_path, caplog):
    changes = {
        "training__steps": 30,
        "checkpoint__every_steps": 10,
        "validation__sequences": 0,
        "optimizer__learning_rate": 1e-4,
    }
    recipe = tiny_recipe(data_folder, "spike", **changes)
    loop.fit(recipe, tmp_path / "run")
    path = Path(tmp_path / "run/metrics.jsonl")
    events = metrics(tmp_path / "run")
    assert not any("loss_spike" in event for event in events)
    # A resume behind losses that were far lower: the first loss of its own is a spike beside them.
    path.write_text(
        "".join(
            json.dumps(event | ({"loss": event["loss"] / 10} if "loss" in event else {})) + "\n" for event in events
        )
    )
    shutil.rmtree(tmp_path / "run/step_00000030")
    loop.fit(recipe, tmp_path / "run")
    rang = [event["step"] for event in metrics(tmp_path / "run") if event.get("loss_spike")]
    assert rang[0] == 21 and "loss spike at step 21" in caplog.text


@pytest.fixture
def damaged(data_folder, tmp_path):
    """A copy of the data in which one shard is damaged and one is missing; and the numbers of the two."""
    folder = tmp_path / "damaged"
    shutil.copytree(data_folder, folder)
    shards = load_index(data_folder).splits["train"].shards
    content = bytearray((folder / shards[1].file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / shards[1].file).write_bytes(content)
    (folder / shards[3].file).unlink()
    return str(folder), (1, 3)


def test_rows_that_cannot_be_read_end_the_run_by_default(damaged, tmp_path):
    with pytest.raises(DamageError, match=r"train-\d+-\d+.tar is (damaged|missing)"):
        loop.fit(tiny_recipe(damaged[0], training__steps=24), tmp_path / "run")


def test_skipped_rows_are_counted_and_listed_and_every_other_row_is_what_it_was(damaged, data_folder, tmp_path):
    folder, bad = damaged
    recipe = tiny_recipe(
        folder,
        "skips",
        training__steps=26,
        checkpoint__every_steps=13,
        data__on_bad_sample="skip",
        validation__sequences=0,
    )
    index = load_index(folder)
    order = Order([index], [1.0], 0, recipe.data.window_shards)
    references, _ = order.references(Cursor.start(1), 26 * 12)  # more than an epoch: it is as long as it was
    expected = sum(one.shard in bad for one in references)
    loop.fit(recipe, tmp_path / "run")
    skipped = commit.read_manifest(listing.latest(str(tmp_path / "run"))).extra["faults"]["skipped_sequences"]
    assert sum(skipped.values()) == expected > 20
    assert {
        name
        for finding in skipped
        for name in (index.splits["train"].shards[number].file for number in bad)
        if name in finding
    } == {index.splits["train"].shards[number].file for number in bad}
    # Resumed in its middle, with the list of the first half in the checkpoint.
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/step_00000026")
    loop.fit(recipe, tmp_path / "cut")
    assert commit.read_manifest(listing.latest(str(tmp_path / "cut"))).extra["faults"]["skipped_sequences"] == skipped
    assert_same_tensors(tmp_path / "run", tmp_path / "cut")
    good = ShardReader([data_folder], [load_index(data_folder)]).read(references)
    left = ShardReader([folder], [index], on_bad_sample="skip").read(references)
    for one, reference, row in zip(good, references, left, strict=True):
        if reference.shard in bad:
            assert (row.document_ids == -1).all() and row.finding and not row.num_bytes.any()
        else:
            assert not row.finding and (row.input_ids == one.input_ids).all()


def test_a_batch_of_nothing_but_damage_ends_the_run_all_the_same(data_folder, tmp_path):
    folder = tmp_path / "none"
    shutil.copytree(data_folder, folder)
    for shard in load_index(data_folder).splits["train"].shards:
        (folder / shard.file).unlink()
    with pytest.raises(DamageError, match=r"step 1: none of its 12 sequences can be read \(shard \S+ is missing"):
        loop.fit(tiny_recipe(str(folder), "none", data__on_bad_sample="skip"), tmp_path / "run")


@pytest.mark.ray
def test_skipped_rows_come_through_ray_data(ray_session, damaged):
    from dlm_ray.runtime.stream import ray_data_stream

    folder, bad = damaged
    index = load_index(folder)
    share = {"global_batch_size": 12, "rank": 1, "world_size": 2, "num_steps": 20}
    order = Order([index], [1.0], 0, 2)
    references, _ = order.references(Cursor.start(1), 240)
    own = [references[step * 12 + row] for step in range(20) for row in range(6, 12)]
    streamed = [
        row
        for rows, _ in ray_data_stream([Source(path=folder)], order, Cursor.start(1), on_bad_sample="skip", **share)
        for row in rows
    ]
    assert [bool(row.finding) for row in streamed] == [one.shard in bad for one in own]
    assert any(row.finding for row in streamed) and len(read_split(folder, "held_out")) > 0
