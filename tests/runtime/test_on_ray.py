"""On a real Ray cluster: the stream, the build, a run on two workers, and a worker that is killed."""

import json
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.data import make_documents
from helpers.recipes import tiny_recipe
from helpers.runs import assert_same_run, losses, tensors
from helpers.victim import group

from dlm_ray.checkpoint import commit, listing
from dlm_ray.config.errors import DamageError, UserError
from dlm_ray.config.recipe import Source
from dlm_ray.data.index import load_index
from dlm_ray.data.order import Cursor, Order
from dlm_ray.data.reading import ShardReader, iterate_sequences
from dlm_ray.training import loop

pytestmark = pytest.mark.ray


def test_ray_data_streams_the_sequences_that_this_process_would_read(ray_session, data_folder, monkeypatch):
    """Also over the borders of items and of spans: 5 items of 4 steps in 2 spans."""
    from dlm_ray.runtime.stream import ray_data_stream

    monkeypatch.setattr("dlm_ray.data.reading._READ_AHEAD_SEQUENCES", 16)
    monkeypatch.setattr("dlm_ray.runtime.stream._WINDOW_ITEMS", 3)
    index = load_index(data_folder)
    share = {"global_batch_size": 7, "rank": 1, "world_size": 2, "num_steps": 20}
    cursor = Cursor(12, (12,))
    expected = list(
        iterate_sequences(ShardReader([data_folder], [index]), Order([index], [1.0], 0, 2), cursor, **share)
    )
    streamed = list(ray_data_stream([Source(path=data_folder)], Order([index], [1.0], 0, 2), cursor, **share))
    assert len(streamed) == 20
    for (rows, at), (expected_rows, expected_at) in zip(streamed, expected, strict=True):
        assert at == expected_at and len(rows) == len(expected_rows)
        for one, two in zip(rows, expected_rows, strict=True):
            assert (one.input_ids == two.input_ids).all() and (one.document_ids == two.document_ids).all()
            assert (one.chunk, one.place) == (two.chunk, two.place) and "sequence" in one.place


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


def test_a_build_is_reproducible_and_resumes_where_it_was_interrupted(ray_session, tmp_path, monkeypatch):
    from dlm_ray.runtime.build import build

    monkeypatch.setattr("dlm_ray.data.sources.CHUNK_BYTES", 4000)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_documents(40)))
    options = {"train_tokenizer_vocab": 300, "sequence_length": 32, "held_out": 0.2}
    steps = []
    index = build(
        [str(tmp_path / "in.jsonl")],
        str(tmp_path / "out"),
        progress=lambda done, total: steps.append((done, total)),
        **options,
    )
    num_chunks = steps[-1][1]
    assert steps[-1] == (num_chunks, num_chunks) and num_chunks > 3
    content = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")}
    # An interrupted build: no index, a chunk missing and one shard cut short.
    (tmp_path / "out/index.json").unlink()
    (tmp_path / "out/parts/00001.json").unlink()
    victim = tmp_path / "out/train-00002-00000.tar"
    victim.write_bytes(victim.read_bytes()[:1000])
    untouched = (tmp_path / "out/parts/00000.json").stat().st_mtime_ns
    assert build([str(tmp_path / "in.jsonl")], str(tmp_path / "out"), **options) == index
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.tar")} == content
    assert (tmp_path / "out/parts/00000.json").stat().st_mtime_ns == untouched
    with pytest.raises(UserError, match="sequence_length was 32, now 64"):
        build([str(tmp_path / "in.jsonl")], str(tmp_path / "out"), **{**options, "sequence_length": 64})
    with pytest.warns(UserWarning, match="the held_out split is empty, so training cannot validate: 1 documents"):
        (tmp_path / "one.txt").write_text("a single file is a single document")
        build([str(tmp_path / "one.txt")], str(tmp_path / "single"), **{**options, "held_out": 0.01})
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


def test_a_killed_worker_changes_nothing_and_two_workers_take_the_steps_of_one_process(
    ray_session, data_folder, tmp_path
):
    """GenMD4, whose objective has parameters: a run on two Ray workers, one of which gets SIGKILL, ends bit for bit as
    two
    ranks without Ray that nothing happens to, and to rounding as one process."""
    from dlm_ray.runtime.train import fit

    recipe = tiny_recipe(
        data_folder,
        "cut",
        objective__name="genmd4",
        optimizer__learning_rate=0.01,
        parallelism__workers=2,
        training__steps=32,
        checkpoint__every_steps=8,
        validation__every_steps=16,
    )
    killed: list[int] = []

    def kill_one(event):
        if event["step"] >= 9 and not killed:
            killed.append(_a_worker())
            os.kill(killed[0], signal.SIGKILL)

    cut = fit(recipe, tmp_path, on_event=kill_one)
    assert killed and cut.step == 32 and not cut.already_finished
    again = fit(recipe, tmp_path)
    assert again.already_finished and again.checkpoint == cut.checkpoint

    assert group(recipe, tmp_path / "whole", 2) == [0, 0]
    assert_same_run(tmp_path / "whole", cut.run_dir)
    whole = listing.latest(str(tmp_path / "whole"))
    assert commit.read_manifest(cut.checkpoint).cursor == commit.read_manifest(whole).cursor

    # One process: the same rows and masks, the loss equal but for the order of sums.
    loop.fit(recipe, tmp_path / "alone")
    assert losses(cut.run_dir) == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)
    theta, theta_alone = (tensors(run_dir)["objective.theta"] for run_dir in (cut.run_dir, tmp_path / "alone"))
    assert torch.allclose(theta, theta_alone, atol=4e-4) and theta.std() > 1e-3


def _a_worker():
    """Return the id of a process that is a Ray Train worker."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (process / "cmdline").read_bytes()
            if command.startswith(b"ray::") and b"RayTrainWorker" in command:
                return int(process.name)
    raise AssertionError("no process is a Ray Train worker")


def test_a_failure_of_the_workers_is_reported_as_one_message_and_not_retried(ray_session, data_folder, tmp_path):
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
        objective__name="helpers.objectives:CountedMasked",
        optimizer__learning_rate=1e30,
        optimizer__warmup_steps=0,
    )
    assert recipe.parallelism.max_failures == 3
    with pytest.raises(
        FloatingPointError,
        match=r"step 2 \(sequences 12 to 23 of the run's order\) of objective helpers\S+: loss \S+, gradient "
        r"norm \S+, not finite",
    ):
        fit(recipe, tmp_path)
    assert ray.get(attempts.add.remote(0)) == 2  # once by the driver, which checks the recipe, and once by the worker
    run_dir = next(tmp_path.glob("explodes-*"))
    assert listing.latest(str(run_dir)) is None and (run_dir / "bad_step_00000002.json").is_file()
