"""A sweep on a real Ray cluster.

Trials side by side, one that fails, what is left behind, and going on after an interruption.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict

import pyarrow.parquet as pq
import pytest
import yaml
from helpers.processes import until
from helpers.recipes import tiny_recipe
from helpers.runs import losses

from dlm_ray.config.errors import UserError
from dlm_ray.config.load import dump, load_recipe
from dlm_ray.config.sweep_load import load_sweep
from dlm_ray.runtime.sweep import run
from dlm_ray.runtime.sweep.tuning import Trial

pytestmark = pytest.mark.ray


def loaded(folder, data, **fields):
    (folder / "recipe.yaml").write_text(dump(tiny_recipe(data, parallelism__max_failures=0)))
    rates = {"optimizer.learning_rate": {"grid": [3e-3, 1e30]}}
    asked = {"sequences": 12, "draws_per_sequence": 2, "variance_draws": 2, "variance_sequences": 6}
    sweep = {
        "name": "s",
        "recipe": str(folder / "recipe.yaml"),
        "space": rates,
        "trials_at_once": 2,
        "measure": asked,
        **fields,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    return load_sweep(str(folder / "sweep.yaml"))


def test_trials_run_and_a_failed_one_is_listed_with_its_reason(ray_session, data_folder, tmp_path):
    import ray
    from ray.util.placement_group import placement_group_table

    out = tmp_path / "out"
    with pytest.raises(
        UserError, match=r"trials_at_once=5 with 1 CPUs per trial do not fit the cluster's 4 CPUs: 4 fit"
    ):
        run.sweep(loaded(tmp_path, data_folder, trials_at_once=5), tmp_path / "too-many")
    said = []
    result = run.sweep(loaded(tmp_path, data_folder), out, emit=said.append)
    good, bad = result["trials"]
    assert (good["status"], good["place"], good["step"]) == ("finished", 1, 8)
    assert bad["status"] == "failed" and "FloatingPointError: step 2" in bad["reason"] and bad["place"] is None
    assert [line["status"] for line in pq.read_table(out / "results.parquet").to_pylist()] == ["finished", "failed"]
    assert (out / "report.html").read_text().count("FloatingPointError") == 1
    assert load_recipe(str(out / "best.yaml")).optimizer.learning_rate == 3e-3
    until(lambda: ray.available_resources().get("CPU") == 4, 60)
    assert {one["state"] for one in placement_group_table().values()} <= {"REMOVED"}

    with pytest.raises(UserError, match="has a sweep already; resume it with `resume`"):
        run.sweep(loaded(tmp_path, data_folder), out)
    with pytest.raises(UserError, match=r"space.optimizer.learning_rate.grid was \[0.003, 1e\+30\] and is \[0.003\]"):
        run.sweep(loaded(tmp_path, data_folder, space={"optimizer.learning_rate": {"grid": [3e-3]}}), out, resume=True)


def test_a_line_that_a_kill_cut_short_is_left_out_of_the_ledger(tmp_path):
    trial = Trial(0, {"seed": 1}, "finished", "", "runs/0", 8)
    whole = json.dumps(asdict(trial)) + "\n"
    (tmp_path / "trials.jsonl").write_text(whole + '{"torn')
    assert run._read_ledger(tmp_path / "trials.jsonl") == {0: trial}
    assert (tmp_path / "trials.jsonl").read_text() == whole


@pytest.mark.slow
def test_a_resumed_sweep_keeps_finished_trials_and_repeats_failed_ones(ray_session, data_folder, tmp_path):
    out = tmp_path / "out"
    result = run.sweep(loaded(tmp_path, data_folder), out)
    lines = (out / "trials.jsonl").read_text().splitlines()
    (out / "trials.jsonl").write_text(
        "".join(line + "\n" for line in lines if json.loads(line)["status"] == "finished") + '{"torn'
    )
    messages = []
    again = run.sweep(loaded(tmp_path, data_folder), out, resume=True, emit=messages.append)
    assert "1 trials, 2 at once" in messages
    assert [one | {"run_dir": ""} for one in again["trials"]] == [one | {"run_dir": ""} for one in result["trials"]]


@pytest.mark.slow
def test_a_trial_whose_worker_is_killed_is_listed_with_its_reason(ray_session, data_folder, tmp_path):
    def kill():
        def notes():
            locks = (tmp_path / "out/trials/0001").glob("*/writer.lock")
            return [text for text in (path.read_text() for path in locks) if "process" in text]

        until(notes, 120)
        os.kill(int(notes()[0].split()[1]), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    whole, killed = run.sweep(
        loaded(tmp_path, data_folder, space={"training.steps": {"grid": [8, 2000]}}), tmp_path / "out"
    )["trials"]
    killer.join()
    assert (whole["status"], whole["place"]) == ("finished", 1)
    assert (killed["status"], killed["place"]) == ("failed", None) and "worker" in killed["reason"]


@pytest.mark.slow
def test_the_worse_member_of_a_population_continues_as_a_copy_of_the_better_one(ray_session, data_folder, tmp_path):
    from dlm_ray.checkpoint import commit

    asked = {
        "space": {"optimizer.learning_rate": {"loguniform": [1e-8, 1e-2]}},
        "search": {"name": "random", "trials": 2, "seed": 1},
        "scheduler": {"name": "pbt", "every_steps": 4, "quantile": 0.5, "resample_probability": 0.0},
    }
    said = []
    members = run.sweep(loaded(tmp_path, data_folder, **asked), tmp_path / "out", emit=said.append)["trials"]
    [copy] = [one for one in members if one["clones"]]
    [donor] = [one for one in members if not one["clones"]]
    [clone] = copy["clones"]
    assert {one["status"] for one in members} == {"finished"} and (clone["from"], clone["step"]) == (donor["number"], 4)
    assert any(
        f"trial {copy['number']} went on as a copy of trial {donor['number']} at step 4" in line for line in said
    )
    logged, theirs = losses(copy["run_dir"]), losses(donor["run_dir"])
    assert list(logged) == list(range(1, 9))
    assert all(
        logged[n] == theirs[n] for n in range(1, 6)
    )  # the copy's fifth step is of the donor's fourth state, before its own learning rate has done anything
    manifest = commit.read_manifest(f"{copy['run_dir']}/step_00000004")
    assert manifest.extra["copied_from"] == f"{donor['run_dir']}/step_00000004"


def command(folder, out, *more):
    arguments = [
        sys.executable,
        "-m",
        "dlm_ray",
        "sweep",
        str(folder / "sweep.yaml"),
        "--out",
        str(out),
        "--json",
        *more,
    ]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_sweep_whose_process_was_killed_resumes_to_the_same_table(data_folder, tmp_path):
    """Killed when the first of three trials has ended and another is under way.

    Each command has a cluster of its own.
    """
    loaded(tmp_path, data_folder, space={"optimizer.learning_rate": {"grid": [3e-3, 1e-3, 3e-4]}}, trials_at_once=1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = json.loads(command(tmp_path, whole).communicate(timeout=600)[0])["trials"]
    assert [one["status"] for one in expected] == ["finished"] * 3

    running = command(tmp_path, killed)
    until(lambda: len(list(killed.glob("trials/*/trial.json"))) >= 2, 600, running)
    running.kill()
    running.communicate()
    assert not (killed / "results.parquet").exists()
    out, err = command(tmp_path, killed, "--resume").communicate(timeout=600)
    assert "2 trials" in err or "1 trials" in err, err
    found = json.loads(out)["trials"]
    own = ("run_dir", "tokens_per_second")
    assert [{**one, **dict.fromkeys(own)} for one in found] == [{**one, **dict.fromkeys(own)} for one in expected]
