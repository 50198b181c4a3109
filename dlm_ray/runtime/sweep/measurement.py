"""Measure the ended trials of a sweep as Ray tasks, once each, on the same sequences and draws."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from dlm_ray.runtime import cluster  # imported first: it sets the variables that Ray reads

# isort: split
import ray

from dlm_ray.checkpoint import listing
from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.evaluation.sweeps.measure import measure
from dlm_ray.evaluation.sweeps.ranking import TrialResult
from dlm_ray.runtime.sweep.plan import Plan, Trial


def measured(plan: Plan, trials: Sequence[Trial], emit: Callable[[str], None]) -> list[TrialResult]:
    """Return the results of trials; those with a checkpoint that is not measured yet are measured first.

    Args:
        plan: of the sweep.
        trials: ended trials.
        emit: called with a message per measured trial.
    """
    waiting: dict[ray.ObjectRef[JsonObject], Trial] = {}
    measurements: dict[int, JsonObject] = {}
    for trial in trials:
        latest = listing.latest(trial.run_dir) if trial.run_dir else None
        note = plan.folder(trial.number) / "measured.json"
        if note.exists() and latest is not None:
            measurement = json.loads(note.read_text())
            if measurement["checkpoint"] == latest:
                measurements[trial.number] = measurement
                continue
        if latest is not None and trial.status != "failed":
            waiting[_task(plan, trial)] = trial
    while waiting:
        [done], _ = ray.wait(list(waiting), num_returns=1)
        trial = waiting.pop(done)
        text = json.dumps({**ray.get(done), "checkpoint": listing.latest(trial.run_dir)})
        (plan.folder(trial.number) / "measured.json").write_text(text)
        measurements[trial.number] = json.loads(text)  # the same values as a resumed sweep reads
        emit(f"measured trial {trial.number}: {measurements[trial.number]['bits_per_byte']:.4f} bits per byte")
    return [_result(plan, trial, measurements.get(trial.number, {})) for trial in trials]


def _task(plan: Plan, trial: Trial) -> ray.ObjectRef[JsonObject]:
    """Start the measurement of a trial."""
    recipe = plan.recipe(trial.settings)
    on_gpu = recipe.parallelism.device != "cpu" and cluster.resources().get("GPU", 0) >= 1
    options = {"num_cpus": recipe.parallelism.cpus_per_worker, "num_gpus": int(on_gpu), "max_retries": 1}
    data = recipe.data.sources[0].path
    task: ray.ObjectRef[JsonObject] = (
        ray.remote(measure).options(**options).remote(trial.run_dir, plan.loaded.sweep.measure, data)
    )
    return task


def _result(plan: Plan, trial: Trial, measurement: JsonObject) -> TrialResult:
    curve = plan.curve(Path(trial.run_dir), plan.recipe(trial.settings)) if trial.run_dir else []
    return TrialResult(
        trial.number,
        trial.settings,
        trial.status,
        trial.reason,
        trial.step,
        trial.run_dir,
        trial.clones,
        curve,
        measurement,
    )
