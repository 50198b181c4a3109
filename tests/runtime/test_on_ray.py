"""On a real Ray cluster: the stream, the build, a run on two workers, and a worker that is killed."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.data import make_documents
from helpers.recipes import tiny_recipe
from helpers.runs import assert_equal_tensors, checkpoint_tensors, losses

from dlm_ray.checkpoint import commit, listing
from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.config.recipe import Source
from dlm_ray.data.index import load_index
from dlm_ray.data.order import Cursor, Order
from dlm_ray.data.reading import ShardReader, iterate_rows
from dlm_ray.diffusion.objectives import Masked
from dlm_ray.training import loop

pytestmark = pytest.mark.ray


def test_ray_data_streams_the_rows_that_this_process_would_read(ray_session, data_folder, monkeypatch):
    """Over the borders of items and of spans too: 8 items of 4 steps in 3 spans."""
    from dlm_ray.runtime.stream import ray_data_stream

    monkeypatch.setattr("dlm_ray.data.reading._READ_AHEAD_ROWS", 16)
    monkeypatch.setattr("dlm_ray.runtime.stream._SPAN_ITEMS", 3)
    index = load_index(data_folder)
    share = {"global_batch_size": 7, "rank": 1, "world_size": 2, "num_steps": 30}
    cursor = Cursor(12, (12,))
    expected = list(iterate_rows(ShardReader([data_folder], [index]), Order([index], [1.0], 0, 2), cursor, **share))
    streamed = list(ray_data_stream([Source(path=data_folder)], Order([index], [1.0], 0, 2), cursor, **share))
    assert len(streamed) == 30
    for (rows, at), (expected_rows, expected_at) in zip(streamed, expected, strict=True):
        assert at == expected_at and len(rows) == len(expected_rows)
        for one, two in zip(rows, expected_rows, strict=True):
            assert (one.input_ids == two.input_ids).all() and (one.document_ids == two.document_ids).all()
            assert (one.part, one.place) == (two.part, two.place) and "row" in one.place


def test_a_damaged_shard_is_named_through_the_stream(ray_session, data_folder, tmp_path):
    from dlm_ray.runtime.stream import ray_data_stream

    folder = tmp_path / "damaged"
    shutil.copytree(data_folder, folder)
    index = load_index(str(folder))
    for shard in index.splits["train"].shards:
        content = (folder / shard.file).read_bytes()
        (folder / shard.file).write_bytes(content[:-1] + b"x")
    share = {"global_batch_size": 7, "rank": 0, "world_size": 1, "num_steps": 3}
    with pytest.raises(DamageError, match=r"train-\d+-\d+.tar is damaged: expected sha256"):
        list(ray_data_stream([Source(path=str(folder))], Order([index], [1.0], 0, 2), Cursor.start(1), **share))


def test_a_build_is_reproducible_and_goes_on_where_it_was_interrupted(ray_session, tmp_path, monkeypatch):
    from dlm_ray.runtime.build import build

    monkeypatch.setattr("dlm_ray.data.sources.PART_BYTES", 4000)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents(40)))
    options = {"train_tokenizer_vocab": 300, "sequence_length": 32, "held_out": 0.2}
    steps = []
    index = build(
        [str(tmp_path / "in.jsonl")],
        str(tmp_path / "out"),
        progress=lambda done, total: steps.append((done, total)),
        **options,
    )
    num_parts = steps[-1][1]
    assert steps[-1] == (num_parts, num_parts) and num_parts > 3
    content = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}
    # An interrupted build: no index, a part missing and one shard cut short.
    (tmp_path / "out/index.json").unlink()
    (tmp_path / "out/parts/00001.json").unlink()
    victim = tmp_path / "out/train-00002-00000.tar"
    victim.write_bytes(victim.read_bytes()[:1000])
    untouched = (tmp_path / "out/parts/00000.json").stat().st_mtime_ns
    assert build([str(tmp_path / "in.jsonl")], str(tmp_path / "out"), **options) == index
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")} == content
    assert (tmp_path / "out/parts/00000.json").stat().st_mtime_ns == untouched
    with pytest.raises(UserError, match="sequence_length was 32, asked 64"):
        build([str(tmp_path / "in.jsonl")], str(tmp_path / "out"), **{**options, "sequence_length": 64})
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="no text in"):
        build([str(tmp_path / "empty.txt")], str(tmp_path / "none"), **options)
    assert not (tmp_path / "none/index.json").exists()
    (tmp_path / "bad.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(UserError, match="no text in field 'text'"):
        build([str(tmp_path / "bad.jsonl")], str(tmp_path / "none"), **options)


def test_more_workers_than_cpus_are_refused_before_anything_starts(ray_session, data_folder, tmp_path):
    from dlm_ray.runtime.train import fit

    with pytest.raises(UserError, match="need 9 CPUs, and the cluster has 4; set parallelism.workers to at most 4"):
        fit(tiny_recipe(data_folder, parallelism__workers=9), tmp_path)


def test_two_workers_take_the_same_steps_as_one_process_and_a_killed_one_changes_nothing(
    ray_session, data_folder, tmp_path
):
    """A run on two workers loses one of them by SIGKILL in its middle: it ends as the run that was left alone, bit for bit."""
    from dlm_ray.runtime.train import fit

    def recipe(name):
        return tiny_recipe(
            data_folder,
            name,
            parallelism__workers=2,
            training__steps=40,
            checkpoint__every_steps=8,
            validation__every_steps=20,
        )

    whole = fit(recipe("whole"), tmp_path)
    assert not whole.already_finished and whole.step == 40

    killed: list[int] = []

    def kill_one(event):
        if event["step"] >= 13 and not killed:
            killed.append(_a_worker())
            os.kill(killed[0], signal.SIGKILL)

    cut = fit(recipe("cut"), tmp_path, on_event=kill_one)
    assert killed and cut.step == 40
    assert losses(cut.run_dir) == losses(whole.run_dir)
    one, two = commit.read_manifest(cut.checkpoint), commit.read_manifest(whole.checkpoint)
    assert one.cursor == two.cursor
    assert_equal_tensors(checkpoint_tensors(whole.checkpoint), checkpoint_tensors(cut.checkpoint))

    # One process: the same rows and masks, the loss equal but for the order of sums.
    loop.fit(recipe("alone"), tmp_path / "alone")
    alone = losses(tmp_path / "alone")
    assert all(alone[step] == pytest.approx(loss, rel=1e-4) for step, loss in losses(whole.run_dir).items())

    again = fit(recipe("whole"), tmp_path)
    assert again.already_finished and again.checkpoint == whole.checkpoint


def test_an_objective_with_parameters_of_its_own_runs_on_two_workers_as_in_one_process(
    ray_session, data_folder, tmp_path
):
    """GenMD4: its exponents are whole on both workers and move together, as one process moves them."""
    from dlm_ray.runtime.train import fit

    recipe = tiny_recipe(
        data_folder, "genmd4", objective__name="genmd4", parallelism__workers=2, optimizer__learning_rate=0.01
    )
    two = fit(recipe, tmp_path)
    loop.fit(recipe, tmp_path / "alone")
    alone = losses(tmp_path / "alone")
    assert all(alone[step] == pytest.approx(loss, rel=1e-4) for step, loss in losses(two.run_dir).items())
    theta = [
        commit.read_tensor(listing.latest(str(path)), "objective.theta") for path in (two.run_dir, tmp_path / "alone")
    ]
    assert torch.allclose(*theta, atol=2e-4) and theta[0].std() > 1e-3


def _a_worker():
    """The process of a Ray Train worker."""
    deadline = time.time() + 30
    while time.time() < deadline:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if command.startswith(b"ray::") and b"RayTrainWorker" in command:
                return int(process.name)
        time.sleep(0.05)
    raise AssertionError(f"no worker among {threading.active_count()} threads' processes")


class CountedMasked(Masked):
    """The objective of the test below, in whatever process builds it: an actor counts how often that is."""

    def __init__(self, *arguments, **options):
        import ray

        super().__init__(*arguments, **options)
        ray.get(ray.get_actor("attempts").add.remote())


def test_a_failure_in_the_workers_comes_back_as_one_message_and_is_not_tried_again(ray_session, data_folder, tmp_path):
    """The rate is what diverges: three more attempts would end as the first."""
    import ray

    from dlm_ray.runtime.train import fit

    class Attempts:
        number = 0

        def add(self, count=1):
            self.number += count
            return self.number

    attempts = ray.remote(num_cpus=0)(Attempts).options(name="attempts").remote()
    recipe = tiny_recipe(
        data_folder,
        "explodes",
        objective__name="runtime.test_on_ray:CountedMasked",
        optimizer__learning_rate=1e30,
        optimizer__warmup_steps=0,
    )
    assert recipe.parallelism.max_failures == 3
    with pytest.raises(
        FloatingPointError,
        match=r"step 2 \(rows 12 to 23 of the run's order\) of objective runtime\S+: loss \S+, gradient norm \S+, not finite",
    ):
        fit(recipe, tmp_path)
    assert ray.get(attempts.add.remote(0)) == 2  # once by the driver, which checks the recipe, and once by the worker
    run_dir = next(tmp_path.glob("explodes-*"))
    assert listing.latest(str(run_dir)) is None and (run_dir / "bad_step_00000002.json").is_file()
