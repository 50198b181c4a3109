"""Ray Tune's schedulers for a sweep: they stop trials, or copy them, by their validation bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dlm_ray.runtime import cluster  # noqa: F401  imported first: it sets the variables that Ray reads

# isort: split
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, PopulationBasedTraining, TrialScheduler

from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.sweep import Dimension, Sweep
from dlm_ray.config.sweep_checks import case_name
from dlm_ray.runtime.sweep.plan import METRIC, Plan

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController


def scheduler_of(plan: Plan) -> TrialScheduler:
    """Return the scheduler of the plan's trials: none for confirming runs, one per group if it ranks by groups."""
    sweep = plan.loaded.sweep
    if plan.is_confirming or sweep.scheduler.name == "none":
        return FIFOScheduler()  # type: ignore[no-untyped-call]  # Ray does not annotate it
    return _PerGroup(sweep) if sweep.rank_by and sweep.scheduler.name != "pbt" else _scheduler(sweep)


def _scheduler(sweep: Sweep) -> TrialScheduler:
    """Return the scheduler that the sweep names."""
    options = sweep.scheduler
    judged: JsonObject = {"metric": METRIC, "mode": "min"}
    if options.name == "asha":
        return tune.schedulers.ASHAScheduler(
            time_attr="tokens",
            max_t=options.min_tokens * 10**6,  # the recipe sets the length of a trial
            grace_period=options.min_tokens,
            reduction_factor=options.reduction_factor,
            **judged,
        )
    if options.name == "median":
        return tune.schedulers.MedianStoppingRule(
            time_attr="tokens", grace_period=options.min_tokens, min_samples_required=2, min_time_slice=0, **judged
        )
    assert options.name == "pbt", f"{options.name} has no scheduler of Tune"
    assert options.every_steps is not None, "checked when the sweep was loaded"
    leaves = {key: one for key, one in sweep.space.items() if one.grid is None and one.cases is None}
    return _Population(
        time_attr="step",
        perturbation_interval=options.every_steps,
        quantile_fraction=options.quantile,
        resample_probability=options.resample_probability,
        hyperparam_mutations={"settings": {key: _mutation(leaf) for key, leaf in leaves.items()}},
        custom_explore_fn=_WithinRanges(leaves),
        synch=True,  # members are compared at the same step
        log_config=False,
        **judged,
    )


class _PerGroup(FIFOScheduler):
    """One scheduler for each value of `rank_by`: a trial is stopped only by trials that it is ranked with."""

    def __init__(self, sweep: Sweep):
        super().__init__()  # type: ignore[no-untyped-call]  # Ray does not annotate it
        self._sweep = sweep
        self._groups: dict[str, TrialScheduler] = {}

    def _of(self, trial: TuneTrial) -> TrialScheduler:
        """Return the scheduler of the trial's group."""
        key = self._sweep.rank_by
        group = case_name(trial.config["settings"].get(key)) if key else ""
        if group not in self._groups:
            self._groups[group] = _scheduler(self._sweep)
        return self._groups[group]

    def on_trial_add(self, tune_controller: TuneController, trial: TuneTrial) -> None:
        """Pass the call on to the group's scheduler."""
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: TuneController, trial: TuneTrial, result: JsonObject) -> str:
        """Return the decision of the group's scheduler."""
        decision: str = self._of(trial).on_trial_result(tune_controller, trial, result)
        return decision

    def on_trial_complete(self, tune_controller: TuneController, trial: TuneTrial, result: JsonObject) -> None:
        """Pass the call on to the group's scheduler."""
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: TuneController, trial: TuneTrial) -> None:
        """Pass the call on to the group's scheduler."""
        self._of(trial).on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: TuneController, trial: TuneTrial) -> None:
        """Pass the call on to the group's scheduler."""
        self._of(trial).on_trial_error(tune_controller, trial)


class _Population(PopulationBasedTraining):
    """Population-based training in which a trial that becomes a copy of another keeps its number."""

    def _get_new_config(self, trial: TuneTrial, trial_to_clone: TuneTrial) -> tuple[JsonObject, JsonObject]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        return {**config, "number": trial.config["number"]}, operations


@dataclass(frozen=True)
class _WithinRanges:
    """Keeps perturbed values within the ranges, whose corners have been checked."""

    leaves: dict[str, Dimension]

    def __call__(self, config: JsonObject) -> JsonObject:
        settings = dict(config["settings"])
        for key, leaf in self.leaves.items():
            if leaf.range is not None:
                settings[key] = min(max(settings[key], leaf.range[0]), leaf.range[1])
        return {**config, "settings": settings}


def _mutation(leaf: Dimension) -> object:
    """Return a dimension in Tune's terms."""
    if leaf.choice is not None:
        return list(leaf.choice)
    assert leaf.range is not None, "checked when the sweep was loaded"
    return tune.uniform(*leaf.range) if leaf.uniform is not None else tune.loguniform(*leaf.range)
