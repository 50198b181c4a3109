"""Run the trials of a sweep on Ray Tune; each trial is an ordinary run on Ray Train that a small driver watches."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from dlm_ray.runtime import cluster  # imported first: it sets the variables that Ray reads when it is imported

# isort: split
from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from dlm_ray.config.errors import UserError
from dlm_ray.config.recipe import Recipe
from dlm_ray.runtime.sweep.driver import drive
from dlm_ray.runtime.sweep.plan import Plan, Trial
from dlm_ray.runtime.sweep.schedulers import scheduler_of
from dlm_ray.runtime.sweep.search import Listed

OnTrial = Callable[[Trial], None]

# A driver reserves no CPU, so that the workers can have all of them; its imports take about this much memory.
_DRIVER: dict[str, float] = {"memory": 400.0 * 2**20}


def check_fits(recipes: Sequence[Recipe], trials_at_once: int) -> None:
    """Check that this many trials fit the connected cluster at once.

    Raises:
        UserError: if they do not; the message says how many do.
    """
    resources = cluster.resources()
    for recipe in recipes:
        cluster.check_fits(recipe.parallelism)
    needs = {
        "CPU": max(one.parallelism.fewest_workers * one.parallelism.cpus_per_worker for one in recipes),
        "GPU": max((one.parallelism.fewest_workers for one in recipes if one.parallelism.device == "cuda"), default=0),
    }
    fitting = min(int(resources.get(kind, 0) / need + 1e-9) for kind, need in needs.items() if need)
    if trials_at_once > fitting:
        per_trial = " and ".join(f"{need:g} {kind}s" for kind, need in needs.items() if need)
        available = " and ".join(f"{resources.get(kind, 0):g} {kind}s" for kind, need in needs.items() if need)
        raise UserError(
            f"trials_at_once={trials_at_once} with {per_trial} per trial do not fit the cluster's {available}: "
            f"{fitting} fit; set trials_at_once to at most {fitting}, or lower parallelism.workers or "
            "parallelism.cpus_per_worker"
        )


def run(plan: Plan, searcher: Listed, num_trials: int, known: dict[int, Trial], on_trial: OnTrial) -> None:
    """Run trials until the searcher has no more.

    Args:
        plan: of the sweep.
        searcher: suggests {"number", "settings"}.
        num_trials: most trials to run.
        known: trials that had ended before, by number: their reports are repeated to the scheduler; nothing is trained.
        on_trial: called in this process with each trial that ends.
    """
    sweep = plan.loaded.sweep
    for logger in ("ray.tune", "ray.train"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    shutil.rmtree(Path(plan.out) / "tune", ignore_errors=True)  # the runs themselves are what is resumed
    is_pbt = sweep.scheduler.name == "pbt" and not plan.is_confirming
    driver = tune.with_parameters(drive, plan=plan, known=known)
    tuner = tune.Tuner(
        tune.with_resources(driver, tune.PlacementGroupFactory([_DRIVER])),
        param_space=_population(searcher) if is_pbt else None,
        tune_config=tune.TuneConfig(
            search_alg=None if is_pbt else searcher,
            scheduler=scheduler_of(plan),
            num_samples=1 if is_pbt else num_trials,
            # All members of a population are in the experiment, paused or not; the workers' CPUs limit how many run.
            max_concurrent_trials=num_trials if is_pbt else sweep.trials_at_once,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=plan.out, verbose=0, callbacks=[_TrialEnd(plan, known, on_trial)]
        ),
    )
    # Tune prints a banner on stdout, which is for results only, and warns of things that users cannot change.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        tuner.fit()


def _population(searcher: Listed) -> dict[str, object]:
    """Return the trials of a population as a grid; Tune's PBT accepts no search algorithm."""
    settings = dict(searcher.waiting)
    return {
        "number": tune.grid_search(list(settings)),
        "settings": tune.sample_from(lambda config: settings[config["number"]]),
    }


class _TrialEnd(tune.Callback):
    """Reports ended trials in the sweep's own process."""

    def __init__(self, plan: Plan, known: dict[int, Trial], on_trial: OnTrial):
        self._plan, self._known, self._on_trial = plan, known, on_trial

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object) -> None:
        """Report a trial whose driver returned or that the scheduler stopped."""
        self._end(trial.config["number"], "")

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object) -> None:
        """Report a trial whose driver raised an exception or died."""
        number = trial.config["number"]
        note = self._plan.folder(number) / "failure.txt"
        self._end(number, note.read_text() if note.exists() else "the process that watched the trial died")

    def _end(self, number: int, reason: str) -> None:
        if number not in self._known:
            self._on_trial(self._plan.ended_trial(number, reason))
