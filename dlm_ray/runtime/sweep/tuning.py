"""Trials on Ray Tune: each is an ordinary run on Ray Train that a small driver watches; schedulers stop trials, or copy them, by their bound."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm_ray.runtime import cluster  # first of all: it sets what Ray reads when it is imported

# isort: split
import ray
from ray import tune
from ray.tune.search import Searcher

from dlm_ray.checkpoint import commit, listing
from dlm_ray.config.errors import UserError
from dlm_ray.config.load import run_name
from dlm_ray.config.recipe import Recipe
from dlm_ray.config.space import Settings
from dlm_ray.config.sweep import Dimension, Scheduler, Sweep, case_name
from dlm_ray.config.sweep_load import Loaded
from dlm_ray.runtime.sweep.search import Listed
from dlm_ray.runtime.train import fit

# A driver holds no CPU, so that the workers may have all of them; what it imports takes about this much memory.
_DRIVER: dict[str, float] = {"memory": 400.0 * 2**20}
_POLL_SECONDS = 0.3
METRIC = "bits_per_byte"


@dataclass(frozen=True)
class Trial:
    """One trial, as a line of trials.jsonl."""

    number: int
    settings: Settings
    status: str
    """finished; stopped (by the scheduler); failed."""
    reason: str = ""
    run_dir: str = ""
    step: int = 0
    clones: list[dict[str, Any]] = field(default_factory=list)
    """Of `pbt`: which checkpoints of others it went on from."""


@dataclass(frozen=True)
class Plan:
    """What a driver needs to run any trial of a sweep."""

    loaded: Loaded
    out: str
    sequence_length: int
    data: str | None = None
    base: str | None = None
    overrides: tuple[str, ...] = ()

    def recipe(self, settings: Settings) -> Recipe:
        """Of a trial."""
        return self.loaded.recipe(settings, self.data, self.base, self.overrides)

    def folder(self, number: int) -> Path:
        """Of a trial: its run lies within, and beside it what this module notes."""
        return Path(self.out) / ("confirmed" if self.overrides else "trials") / f"{number:04d}"

    def tokens(self, recipe: Recipe, steps: int) -> int:
        """Of so many steps."""
        return steps * recipe.training.global_batch_size * self.sequence_length


def check_fits(recipes: Sequence[Recipe], trials_at_once: int) -> None:
    """Raises UserError if so many trials do not fit the connected cluster at once; says how many do."""
    resources = ray.cluster_resources()
    for recipe in recipes:
        cluster.check_fits(recipe.parallelism)
    needs = {
        "CPU": max(one.parallelism.fewest_workers * one.parallelism.cpus_per_worker for one in recipes),
        "GPU": max((one.parallelism.fewest_workers for one in recipes if one.parallelism.device == "cuda"), default=0),
    }
    fitting = min(int(resources.get(kind, 0) / need + 1e-9) for kind, need in needs.items() if need)
    if trials_at_once > fitting:
        what = " and ".join(f"{need:g} {kind}s" for kind, need in needs.items() if need)
        has = " and ".join(f"{resources.get(kind, 0):g} {kind}s" for kind, need in needs.items() if need)
        raise UserError(
            f"trials_at_once={trials_at_once} with {what} a trial do not fit the cluster's {has}: {fitting} fit; set trials_at_once to at most "
            f"{fitting}, or lower parallelism.workers or parallelism.cpus_per_worker"
        )


def run(
    plan: Plan, searcher: Searcher, num_trials: int, known: dict[int, Trial], on_trial: Callable[[Trial], None]
) -> None:
    """Runs trials until the searcher has no more; `on_trial` is told of each as it ends.

    Args:
        plan: of the sweep.
        searcher: suggests {"number", "settings"}.
        num_trials: at most.
        known: trials that had ended before, by number: their reports are told to the scheduler again, and nothing is trained.
        on_trial: called in this process.
    """
    sweep = plan.loaded.sweep
    for chatty in ("ray.tune", "ray.train"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    own = Path(plan.out) / "tune"
    shutil.rmtree(own, ignore_errors=True)  # what is resumed is read from the runs themselves
    is_pbt = sweep.scheduler.name == "pbt" and not plan.overrides
    listed = dict(searcher.waiting) if is_pbt and isinstance(searcher, Listed) else {}
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_drive, plan=plan, known=known), tune.PlacementGroupFactory([_DRIVER])
        ),
        # Tune's PBT takes no search algorithm: its members are a grid.
        param_space={
            "number": tune.grid_search(list(listed)),
            "settings": tune.sample_from(lambda config: listed[config["number"]]),
        }
        if is_pbt
        else None,
        tune_config=tune.TuneConfig(
            search_alg=None if is_pbt else searcher,
            scheduler=_chosen(plan),
            num_samples=1 if is_pbt else num_trials,
            # Of pbt all members are in the experiment, paused or not; how many run at once is for the workers' CPUs to say.
            max_concurrent_trials=num_trials if is_pbt else sweep.trials_at_once,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=plan.out, verbose=0, callbacks=[_Ended(plan, known, on_trial)]
        ),
    )
    # Tune prints a banner, and stdout has the result alone; what it warns of is not in the hands of who runs a sweep.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        tuner.fit()


def _chosen(plan: Plan) -> Any:
    sweep = plan.loaded.sweep
    if plan.overrides or sweep.scheduler.name == "none":
        return tune.schedulers.FIFOScheduler()
    return _Grouped(sweep) if sweep.rank_by and sweep.scheduler.name != "pbt" else _scheduler(sweep)


def _scheduler(sweep: Sweep) -> Any:
    asked: Scheduler = sweep.scheduler
    judged: dict[str, Any] = {"metric": METRIC, "mode": "min"}
    if asked.name == "asha":
        return tune.schedulers.ASHAScheduler(
            time_attr="tokens",
            max_t=asked.min_tokens * 10**6,  # how long a trial is, is said by its recipe
            grace_period=asked.min_tokens,
            reduction_factor=asked.reduction_factor,
            **judged,
        )
    if asked.name == "median":
        return tune.schedulers.MedianStoppingRule(
            time_attr="tokens", grace_period=asked.min_tokens, min_samples_required=2, min_time_slice=0, **judged
        )
    if asked.name == "pbt":
        assert asked.every_steps is not None, "checked when the sweep was loaded"
        leaves = {key: one for key, one in sweep.space.items() if one.grid is None and one.cases is None}
        return _Population(
            time_attr="step",
            perturbation_interval=asked.every_steps,
            quantile_fraction=asked.quantile,
            resample_probability=asked.resample_probability,
            hyperparam_mutations={"settings": {key: _mutation(leaf) for key, leaf in leaves.items()}},
            custom_explore_fn=_Within(leaves),
            synch=True,  # members are compared at the same step
            log_config=False,
            **judged,
        )
    raise AssertionError(f"{asked.name} has no scheduler of Tune")


class _Grouped(tune.schedulers.FIFOScheduler):
    """A scheduler for every value of `rank_by`: only trials that are ranked together are stopped by each other."""

    def __init__(self, sweep: Sweep):
        super().__init__()
        self._sweep = sweep
        self._groups: dict[str, Any] = {}

    def _of(self, trial: Any) -> Any:
        key = self._sweep.rank_by
        group = case_name(trial.config["settings"].get(key)) if key else ""
        if group not in self._groups:
            self._groups[group] = _scheduler(self._sweep)
        return self._groups[group]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Told to its group's."""
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """What its group's decides."""
        decision: str = self._of(trial).on_trial_result(tune_controller, trial, result)
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Told to its group's."""
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Told to its group's."""
        self._of(trial).on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Told to its group's."""
        self._of(trial).on_trial_error(tune_controller, trial)


def _mutation(leaf: Dimension) -> Any:
    if leaf.choice is not None:
        return list(leaf.choice)
    assert leaf.range is not None, "checked when the sweep was loaded"
    return tune.uniform(*leaf.range) if leaf.uniform is not None else tune.loguniform(*leaf.range)


class _Population(tune.schedulers.PopulationBasedTraining):
    """A member that becomes a copy of a better one keeps its number: the copy is of settings and state."""

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        return {**config, "number": trial.config["number"]}, operations


@dataclass(frozen=True)
class _Within:
    """Keeps what PBT perturbs within the ranges whose corners were checked."""

    leaves: dict[str, Dimension]

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        settings = dict(config["settings"])
        for key, leaf in self.leaves.items():
            if leaf.range is not None:
                settings[key] = min(max(settings[key], leaf.range[0]), leaf.range[1])
        return {**config, "settings": settings}


class _Ended(tune.Callback):
    """Notes in the sweep's own process what became of a trial."""

    def __init__(self, plan: Plan, known: dict[int, Trial], on_trial: Callable[[Trial], None]):
        self._plan, self._known, self._on_trial = plan, known, on_trial

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The driver returned, or the scheduler stopped it."""
        self._end(trial.config["number"], "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The driver raised or died."""
        number = trial.config["number"]
        note = self._plan.folder(number) / "failure.txt"
        self._end(number, note.read_text() if note.exists() else "the process that watched the trial died")

    def _end(self, number: int, reason: str) -> None:
        if number not in self._known:
            self._on_trial(_ended(self._plan, number, reason))


def _ended(plan: Plan, number: int, reason: str) -> Trial:
    folder = plan.folder(number)
    note = folder / "trial.json"
    if not note.exists():
        return Trial(number, {}, "failed", reason or "it was never started")
    fields = json.loads(note.read_text())
    step = max(listing.committed_steps(fields["run_dir"]), default=0)
    is_whole = step >= plan.recipe(fields["settings"]).training.steps
    status = "failed" if reason else "finished" if is_whole else "stopped"
    return Trial(**fields, status=status, reason=reason, step=step, clones=_clones(folder))


def _drive(config: dict[str, Any], plan: Plan, known: dict[int, Trial]) -> None:
    """One trial: an ordinary run in a thread, whose validations are reported to Tune as they are written."""
    number, settings = config["number"], config["settings"]
    if number in known:
        _tell_again(plan, known[number])
        return
    recipe = plan.recipe(settings)
    start = tune.get_checkpoint()
    point = json.loads(Path(start.path, "point.json").read_text()) if start is not None else None
    folder = _segment(plan.folder(number), number, settings, point)
    run_dir = folder / run_name(recipe)
    if point is not None and point["number"] != number:
        _clone(point, run_dir, recipe)
    note = {"number": number, "settings": settings, "run_dir": str(run_dir)}
    (plan.folder(number) / "trial.json").write_text(json.dumps(note))
    failures: list[BaseException] = []

    def train() -> None:
        try:
            fit(recipe, folder)
        except BaseException as error:
            failures.append(error)

    trainer = threading.Thread(target=train, daemon=True)
    trainer.start()
    reported = point["step"] if point is not None else 0
    needs_checkpoint = plan.loaded.sweep.scheduler.name != "none" and not plan.overrides
    # Nobody goes on from the last state of a population's member: its copy would be the same result under other settings.
    last_told = recipe.training.steps - (plan.loaded.sweep.scheduler.name == "pbt")
    is_last = False
    while not is_last:
        trainer.join(_POLL_SECONDS)
        is_last = not trainer.is_alive()
        for one in _validations(run_dir, plan, recipe):
            if not reported < one["step"] <= last_told or (
                needs_checkpoint and not listing.is_committed(listing.step_directory(str(run_dir), one["step"]))
            ):
                continue
            reported = one["step"]
            with tempfile.TemporaryDirectory() as pointer:
                Path(pointer, "point.json").write_text(
                    json.dumps({"number": number, "run_dir": str(run_dir), "step": reported})
                )
                tune.report(one, checkpoint=tune.Checkpoint.from_directory(pointer))
    if failures:
        (plan.folder(number) / "failure.txt").write_text(f"{type(failures[0]).__name__}: {failures[0]}")
        raise failures[0]


def _tell_again(plan: Plan, trial: Trial) -> None:
    """A trial that had ended before: its reports once more, so that the scheduler compares others with it."""
    recipe = plan.recipe(trial.settings)
    for one in _validations(Path(trial.run_dir), plan, recipe):
        if one["step"] <= trial.step:
            tune.report(one)


def _validations(run_dir: Path, plan: Plan, recipe: Recipe) -> Iterator[dict[str, Any]]:
    """What a run has validated so far: step, tokens, bits_per_byte."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return
    text = path.read_text()
    for line in text[: text.rfind("\n") + 1].splitlines():
        event = json.loads(line)
        if METRIC in event.get("validation", {}):
            yield {
                "step": event["step"],
                "tokens": plan.tokens(recipe, event["step"]),
                METRIC: event["validation"][METRIC],
            }


def curve(run_dir: Path, plan: Plan, recipe: Recipe) -> list[tuple[float, float]]:
    """(tokens, bits per byte) of a run's validations."""
    return [(one["tokens"], one[METRIC]) for one in _validations(run_dir, plan, recipe)]


def _segment(folder: Path, number: int, settings: Settings, point: dict[str, Any] | None) -> Path:
    """Where a trial's run lies: its own folder, and another within for every time that it became a copy of a better one."""
    folder.mkdir(parents=True, exist_ok=True)
    clones = _clones(folder)
    if point is not None and point["number"] != number:
        clone = {"from": point["number"], "step": point["step"], "run_dir": point["run_dir"], "settings": settings}
        if clones[-1:] != [clone]:
            clones.append(clone)
            (folder / "clones.json").write_text(json.dumps(clones))
    return folder / f"clone-{len(clones)}" if clones else folder


def _clones(folder: Path) -> list[dict[str, Any]]:
    path = folder / "clones.json"
    return json.loads(path.read_text()) if path.exists() else []


def _clone(point: dict[str, Any], run_dir: Path, recipe: Recipe) -> None:
    """The checkpoint of another run as this run's, with its optimizer, its cursor and its step; and that run's metrics up to there."""
    if listing.latest(str(run_dir)) is not None:
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = Path(point["run_dir"], "metrics.jsonl").read_text().splitlines(keepends=True)
    own = (line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= point["step"])
    (run_dir / "metrics.jsonl").write_text("".join(own))
    donor, copied = (listing.step_directory(str(one), point["step"]) for one in (point["run_dir"], run_dir))
    commit.copy(donor, copied, recipe.model_dump(mode="json"))
