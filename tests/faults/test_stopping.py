"""A run that is asked to stop commits first, and the same command goes on.

SIGTERM, a file, fewer and more workers, a second writer.
"""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
from helpers.processes import PROCESSES, ForkedModule, until
from helpers.recipes import tiny_recipe
from helpers.runs import assert_same_run, losses
from helpers.victim import Death, group

from dlm_ray.checkpoint import commit, listing
from dlm_ray.config.errors import Stopped, UserError
from dlm_ray.config.load import dump
from dlm_ray.config.recipe import Recipe
from dlm_ray.data.index import load_index
from dlm_ray.data.order import Cursor, Order
from dlm_ray.data.reading import ShardReader
from dlm_ray.training import guards, loop

pytestmark = pytest.mark.long


def test_sigterm_to_one_rank_commits_on_all_and_the_run_that_goes_on_is_the_run_that_was_not_asked(
    data_folder, tmp_path
):
    recipe = tiny_recipe(data_folder, "asked", training__steps=12)
    assert group(recipe, tmp_path / "whole", 2) == [0, 0]
    request = Death("step", number=6, share=0.5, rank=1, marker=str(tmp_path / "marker"), signal=signal.SIGTERM)
    assert group(recipe, tmp_path / "asked", 2, death=request) == [75, 75]
    assert (
        listing.committed_steps(str(tmp_path / "asked"))[-1] == 6
    )  # the step that was running, at no multiple of checkpoint.every_steps
    assert group(recipe, tmp_path / "asked", 2) == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "asked")


def test_the_command_without_ray_exits_with_75_and_goes_on_when_it_is_typed_again(data_folder, tmp_path):
    """The whole command as a person types it, and SIGTERM as a cluster sends it."""
    recipe = tiny_recipe(
        data_folder,
        "typed",
        training__steps=200,
        training__global_batch_size=4,
        training__micro_batch_size=4,
        checkpoint__every_steps=200,
        validation__sequences=0,
    )
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    command = [tmp_path, "dlm_ray.training", tmp_path / "recipe.yaml", "--out", tmp_path]
    process = ForkedModule(*command)
    until(lambda: any(losses(path.parent) for path in tmp_path.glob("typed-*/metrics.jsonl")), 60, process)
    process.send_signal(signal.SIGTERM)
    code, _, stderr = process.wait()
    assert code == 75 and "stopped after step" in stderr and "holds the state" in stderr
    [run_dir] = tmp_path.glob("typed-*")
    stopped_at = listing.committed_steps(str(run_dir))[-1]
    assert 0 < stopped_at < 200
    code, stdout, stderr = ForkedModule(*command).wait()
    assert code == 0, stderr
    assert f"resumed from {run_dir}/step_{stopped_at:08d}" in stderr
    assert stdout.strip() == f"{run_dir}/step_00000200"


def test_a_file_stops_a_run_and_is_gone_when_it_has(data_folder, tmp_path):
    recipe, before = tiny_recipe(data_folder, "file"), signal.getsignal(signal.SIGTERM)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stop").touch()
    with pytest.raises(Stopped, match="stopped after step 1 of 8, as requested; .*step_00000001 holds the state"):
        loop.fit(recipe, tmp_path / "run")
    assert loop.fit(recipe, tmp_path / "run")["step"] == 8
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_machine_that_leaves_is_one_more_checkpoint_and_no_end(data_folder, tmp_path):
    asked = []

    def is_machine_leaving():
        asked.append(None)
        return len(asked) >= 3

    committed = []
    loop.fit(
        tiny_recipe(data_folder, "leaving"),
        tmp_path / "run",
        report=lambda metrics, directory: committed.append(metrics["step"]),
        is_machine_leaving=is_machine_leaving,
    )
    assert committed == [3, 4, 8]


def test_two_workers_one_two_and_three_are_one_run(data_folder, tmp_path):
    """The same rows and masks at every step as one process alone.

    Every row once an epoch; losses equal but for the order of sums.
    """
    recipe = tiny_recipe(
        data_folder, "resized", training__steps=40, checkpoint__every_steps=10, validation__every_steps=40
    )
    assert group(recipe, tmp_path / "alone", 1, watch=str(tmp_path / "watched-alone")) == [0]
    for stage, (num_ranks, stop_at) in enumerate([(2, 9), (1, 17), (2, 28), (3, None)]):
        begun = [0, 9, 17, 28][stage]
        request = stop_at and Death(
            "step", stop_at - begun, 0.0, num_ranks - 1, str(tmp_path / "marker"), signal.SIGTERM
        )
        codes = group(recipe, tmp_path / "resized", num_ranks, death=request, watch=str(tmp_path / f"watched-{stage}"))
        assert codes == [75 if stop_at else 0] * num_ranks
    alone, resized = watched(tmp_path, "watched-alone.*"), watched(tmp_path, "watched-[0-9].*")
    assert sorted(alone) == sorted(resized) == list(range(40))
    assert [resized[step]["masks"] for step in range(40)] == [alone[step]["masks"] for step in range(40)]
    assert [resized[step]["world_size"] for step in (0, 8, 9, 16, 17, 27, 28, 39)] == [2, 2, 1, 1, 2, 2, 3, 3]
    rows_taken = [row for step in range(40) for row in resized[step]["rows"]]
    an_epoch = load_index(data_folder).splits["train"].sequences
    assert len(rows_taken) == 480 > an_epoch
    assert rows_taken == expected_rows(recipe, 480)
    references, _ = order_of(recipe).references(Cursor.start(1), an_epoch)
    assert len(set(references)) == an_epoch
    one, other = losses(tmp_path / "alone"), losses(tmp_path / "resized")
    assert one.keys() == other.keys() and all(other[step] == pytest.approx(one[step], rel=1e-4) for step in one)


def watched(folder, pattern):
    """By step: what all ranks together took, in the order of the global batch."""
    lines = [
        (step["step"], int(path.suffix[1:]), step)
        for path in folder.glob(pattern)
        for step in map(json.loads, path.read_text().splitlines())
    ]
    steps = {}
    for step, _, line in sorted(lines, key=lambda line: line[:2]):
        known = steps.setdefault(step, {"rows": [], "masks": [], "world_size": line["world_size"]})
        known["rows"] += line["rows"]
        known["masks"] += line["masks"]
    return steps


def order_of(recipe: Recipe):
    return Order(
        [load_index(source.path) for source in recipe.data.sources], [1.0], recipe.seed, recipe.data.window_shards
    )


def expected_rows(recipe, count):
    order = order_of(recipe)
    references, _ = order.references(Cursor.start(1), count)
    rows = ShardReader([source.path for source in recipe.data.sources], order.indexes).read(references)
    return [hashlib.sha256(row.input_ids.tobytes() + row.document_ids.tobytes()).hexdigest() for row in rows]


def hold(run_dir, line):
    """Own `run_dir` as its writer, from a line that says so to one that says to end."""
    with guards.sole_owner(Path(run_dir), "writer"):
        line.send("held")
        line.recv()


@pytest.fixture
def holder(tmp_path):
    """Return a process that is the writer of `run`, and the line on which it is told to end."""
    line, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=hold, args=(str(tmp_path / "run"), theirs))
    process.start()
    assert line.recv() == "held"
    yield process, line
    process.kill()
    process.join()


def test_a_run_directory_has_one_writer_who_is_named_and_a_dead_one_is_none(holder, data_folder, tmp_path):
    recipe = tiny_recipe(data_folder, "locked", training__steps=4)
    process, _ = holder
    message = rf"belongs to a run in progress: process {process.pid} on {os.uname().nodename}, which began at 20\d\d-"
    with pytest.raises(UserError, match=message):
        loop.fit(recipe, tmp_path / "run")
    # Both of two ranks refuse, though only the first has asked.
    assert group(recipe, tmp_path / "run", 2) == [1, 1]
    assert all(str(process.pid) in (tmp_path / f"run.error{rank}").read_text() for rank in (0, 1))
    process.kill()  # SIGKILL: it lets go of nothing by itself
    process.join()
    assert loop.fit(recipe, tmp_path / "run")["step"] == 4


def test_a_writer_that_is_ending_is_waited_for(holder, data_folder, tmp_path):
    process, line = holder
    recipe = tiny_recipe(data_folder, "patient", training__steps=2)
    line.send("end")
    assert loop.fit(recipe, tmp_path / "run", patience_seconds=60)["step"] == 2


def test_a_run_directory_of_another_recipe_is_refused_with_the_difference(data_folder, tmp_path):
    loop.fit(tiny_recipe(data_folder, "first", training__steps=4), tmp_path / "run")
    changes = {
        "training__steps": 9,
        "optimizer__learning_rate": 0.5,
        "ema": None,
        "checkpoint__every_steps": 3,
        "training__max_skipped_steps": 2,
    }
    with pytest.raises(UserError) as refusal:
        loop.fit(tiny_recipe(data_folder, "first", **changes), tmp_path / "run")
    said = str(refusal.value)
    assert (
        "optimizer.learning_rate: the checkpoint has 0.003, the recipe has 0.5" in said
        and "training.steps: the checkpoint has 4, the recipe has 9" in said
    )
    assert (
        "ema.decay: the checkpoint has 0.9, the recipe has null" in said
        or 'ema: the checkpoint has {"decay": 0.9}, the recipe has null' in said
    )
    assert "checkpoint." not in said and "max_skipped" not in said
    assert (
        guards.data_identity([load_index(data_folder)])
        == commit.read_manifest(listing.latest(str(tmp_path / "run"))).extra["data"]
    )
