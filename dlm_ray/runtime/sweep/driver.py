"""The driver of one trial: it runs the trial's recipe in a thread and reports its validations to Ray Tune."""

from __future__ import annotations

import json
import tempfile
import threading
from pathlib import Path
from typing import TypedDict

from dlm_ray.runtime import cluster  # noqa: F401  imported first: it sets the variables that Ray reads

# isort: split
from ray import tune

from dlm_ray.checkpoint import commit, listing
from dlm_ray.checkpoint.manifest import read_manifest
from dlm_ray.config.load import run_name
from dlm_ray.config.recipe import Recipe
from dlm_ray.config.space import Settings
from dlm_ray.runtime.sweep.plan import Clone, Plan, Suggestion, Trial, Validation, clones_of
from dlm_ray.runtime.train import fit

_POLL_SECONDS = 0.3


class Point(TypedDict):
    """A checkpoint of a trial, as it is handed to Tune."""

    number: int
    run_dir: str
    step: int


def drive(config: Suggestion, plan: Plan, known: dict[int, Trial]) -> None:
    """Run one trial.

    Args:
        config: `number` and `settings` of the trial.
        plan: of the sweep.
        known: trials that had ended before; their reports are repeated, and nothing is trained.
    """
    number, settings = config["number"], config["settings"]
    if number in known:
        _repeat_reports(plan, known[number])
        return
    recipe = plan.recipe(settings)
    start = tune.get_checkpoint()
    point: Point | None = json.loads(Path(start.path, "point.json").read_text()) if start is not None else None
    folder = _run_folder(plan.folder(number), number, settings, point)
    run_dir = folder / run_name(recipe)
    if point is not None and point["number"] != number:
        _copy(point, run_dir, recipe)
    note = {"number": number, "settings": settings, "run_dir": str(run_dir)}
    (plan.folder(number) / "trial.json").write_text(json.dumps(note))
    failure = _train_and_report(plan, number, recipe, run_dir, point["step"] if point is not None else 0)
    if failure is not None:
        (plan.folder(number) / "failure.txt").write_text(f"{type(failure).__name__}: {failure}")
        raise failure


def _train_and_report(plan: Plan, number: int, recipe: Recipe, run_dir: Path, reported: int) -> BaseException | None:
    """Train in a thread and report the validations after step `reported`; return the failure, if there is one."""
    failures: list[BaseException] = []

    def train() -> None:
        try:
            fit(recipe, run_dir.parent)
        except BaseException as error:
            failures.append(error)

    trainer = threading.Thread(target=train, daemon=True)
    trainer.start()
    scheduler = plan.loaded.sweep.scheduler.name
    needs_checkpoint = scheduler != "none" and not plan.is_confirming
    # A copy of a population member's last state would be the same result under other settings.
    last_reported = recipe.training.steps - (scheduler == "pbt")
    is_last_round = False
    while not is_last_round:
        trainer.join(_POLL_SECONDS)
        is_last_round = not trainer.is_alive()
        for validation in plan.validations(run_dir, recipe):
            step = validation["step"]
            if not reported < step <= last_reported:
                continue
            if needs_checkpoint and not listing.is_committed(listing.step_directory(str(run_dir), step)):
                continue
            reported = step
            _report(validation, {"number": number, "run_dir": str(run_dir), "step": step})
    return failures[0] if failures else None


def _report(validation: Validation, point: Point) -> None:
    """Report a validation to Tune, with a pointer to the checkpoint in place of the checkpoint."""
    with tempfile.TemporaryDirectory() as pointer:
        Path(pointer, "point.json").write_text(json.dumps(point))
        tune.report(validation, checkpoint=tune.Checkpoint.from_directory(pointer))


def _repeat_reports(plan: Plan, trial: Trial) -> None:
    """Repeat the reports of a trial that had ended before, so that the scheduler compares other trials with it."""
    recipe = plan.recipe(trial.settings)
    for validation in plan.validations(Path(trial.run_dir), recipe):
        if validation["step"] <= trial.step:
            tune.report(validation)


def _run_folder(folder: Path, number: int, settings: Settings, point: Point | None) -> Path:
    """Return where the trial's run lies: its folder, or a subfolder for each time that it became a copy of another."""
    folder.mkdir(parents=True, exist_ok=True)
    clones = clones_of(folder)
    if point is not None and point["number"] != number:
        clone: Clone = {
            "from": point["number"],
            "step": point["step"],
            "run_dir": point["run_dir"],
            "settings": settings,
        }
        if clones[-1:] != [clone]:
            clones.append(clone)
            (folder / "clones.json").write_text(json.dumps(clones))
    return folder / f"clone-{len(clones)}" if clones else folder


def _copy(point: Point, run_dir: Path, recipe: Recipe) -> None:
    """Copy a checkpoint of another run, with its optimizer, cursor, step and metrics up to there, into this run."""
    if listing.latest(str(run_dir)) is not None:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = Path(point["run_dir"], "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = (line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= point["step"])
    (run_dir / "metrics.jsonl").write_text("".join(kept))
    donor, copy = (listing.step_directory(str(run), point["step"]) for run in (point["run_dir"], run_dir))
    fields = recipe.model_dump(mode="json")
    fields["training"]["precision"] = read_manifest(donor).recipe["training"]["precision"]  # `auto` is resolved
    commit.copy(donor, copy, fields)
