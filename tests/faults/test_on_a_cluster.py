"""On Ray: drivers that are killed and asked to stop, mistakes that are not tried again, machines that go and come."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.processes import until
from helpers.recipes import tiny_recipe
from helpers.runs import assert_same_tensors, losses, metrics

from dlm_ray.checkpoint import commit, listing
from dlm_ray.config.errors import Stopped
from dlm_ray.config.load import dump
from dlm_ray.training import loop

pytestmark = [pytest.mark.ray, pytest.mark.faults]


def test_a_driver_that_is_killed_and_one_that_is_asked_to_stop_change_nothing(ray_session, data_folder, tmp_path):
    """SIGKILL, at once the same command.

    SIGTERM, exit code 75, the same command: the bits of a run that was left alone.
    """
    import ray

    recipe = tiny_recipe(
        data_folder, "driven", training__steps=400, checkpoint__every_steps=20, validation__every_steps=200
    )
    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    command = [sys.executable, "-m", "dlm_ray", "train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path)]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}

    def started():
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def last_step():
        return max((max(losses(path.parent), default=0) for path in tmp_path.glob("driven-*/metrics.jsonl")), default=0)

    first = started()
    until(lambda: last_step() >= 45, 120, first)
    first.kill()
    first.wait()
    killed_at = last_step()
    second = started()  # the workers of the first may still be there
    until(lambda: last_step() > max(killed_at, 60) + 40, 120, second)
    second.send_signal(signal.SIGTERM)
    _, said = second.communicate(timeout=120)
    assert second.returncode == 75 and "holds its state, and the same command goes on" in " ".join(said.split()), said
    third = started()
    _, said = third.communicate(timeout=120)
    assert third.returncode == 0, said
    [run_dir] = tmp_path.glob("driven-*")
    loop.fit(recipe, tmp_path / "alone")
    assert losses(run_dir) == losses(tmp_path / "alone")
    assert_same_tensors(tmp_path / "alone", run_dir)


def test_a_file_stops_two_workers_together(ray_session, data_folder, tmp_path):
    from dlm_ray.runtime.train import fit

    recipe = tiny_recipe(
        data_folder,
        "filed",
        training__steps=2000,
        checkpoint__every_steps=1000,
        parallelism__workers=2,
        validation__sequences=0,
    )
    notices = []

    def stop(event):
        if event["step"] >= 10 and not notices:
            notices.append(event["step"])
            (next(tmp_path.glob("filed-*")) / "stop").touch()

    with pytest.raises(Stopped, match="asked to stop before step 2000; .* holds its state"):
        fit(recipe, tmp_path, on_event=stop)
    run_dir = next(tmp_path.glob("filed-*"))
    assert commit.verify(listing.latest(str(run_dir))) == [] and not (run_dir / "stop").exists()


def test_machines_that_go_and_come_are_lost_and_taken_up_again(ray_session, data_folder, tmp_path):
    """Two workers on two machines; one machine dies; one worker goes on; another machine comes; two go on."""
    import ray

    from dlm_ray.runtime.train import fit

    recipe = tiny_recipe(
        data_folder,
        "elastic",
        training__steps=6000,
        training__global_batch_size=4,
        training__micro_batch_size=2,
        checkpoint__every_steps=25,
        validation__sequences=0,
        tracking__log_every_steps=5,
        parallelism__workers={"min": 1, "max": 2, "resize_check_seconds": 1},
        parallelism__cpus_per_worker=4,
    )
    machines = [machine(ray)]
    seen, latest = [], [0]

    def act(event):
        if event["step"] <= latest[0]:
            return  # a resumed run writes its file anew, and the lines before come once more
        latest[0] = event["step"]
        workers = event.get("workers")
        if workers and (not seen or seen[-1][0] != workers):
            seen.append((workers, event["step"]))
        if len(seen) == 1 and event["step"] > seen[0][1] + 20 and len(machines) == 1:
            machines[0].kill()
            machines[0].wait()
            machines.append(None)
        if len(seen) == 2 and event["step"] > seen[1][1] + 20 and len(machines) == 2:
            machines.append(machine(ray))
        if len(seen) == 3 and event["step"] > seen[2][1] + 20:
            (next(tmp_path.glob("elastic-*")) / "stop").touch()

    try:
        with pytest.raises(Stopped):
            fit(recipe, tmp_path, on_event=act)
    finally:
        for process in machines:
            if process is not None:
                process.kill()
                process.wait()
    assert [workers for workers, _ in seen] == [2, 1, 2]
    run_dir = next(tmp_path.glob("elastic-*"))
    together = losses(run_dir)
    assert {line["workers"] for line in metrics(run_dir) if "workers" in line} == {1, 2}
    # Alone to where it was stopped; the recipe's own number of steps says how the rate falls, so it is stopped, too.
    last = max(together)

    def stop(metrics, directory):
        if metrics["step"] >= last:
            (tmp_path / "alone/stop").touch()

    with pytest.raises(Stopped):
        loop.fit(recipe, tmp_path / "alone", report=stop)
    alone = losses(tmp_path / "alone")
    assert all(loss == pytest.approx(alone[step], rel=2e-3) for step, loss in together.items())


def machine(ray):
    """A machine of 4 CPUs that joins the session's cluster, as a process of its own."""
    address = ray.get_runtime_context().gcs_address
    before = len([node for node in ray.nodes() if node["Alive"]])
    command = [
        "start",
        f"--address={address}",
        "--num-cpus=4",
        "--block",
        "--disable-usage-stats",
        "--object-store-memory=100000000",
    ]
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("ray")), *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    until(lambda: len([node for node in ray.nodes() if node["Alive"]]) > before, 120, process)
    return _Machine(process)


class _Machine:
    """Killed as a machine is: all its processes at once."""

    def __init__(self, process):
        self._process = process

    def kill(self):
        processes = [self._process.pid]
        for pid in processes:  # grows while it is walked
            processes += children(pid)
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self):
        self._process.wait()


def children(pid):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found.append(int(path.parent.name))
    return found
