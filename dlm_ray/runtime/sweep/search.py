"""Searchers for Ray Tune: a list of trials, or Optuna's tree-structured Parzen estimator over a conditional space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from dlm_ray.runtime import cluster  # noqa: F401  imported first: it sets the variables that Ray reads

# isort: split
from ray.tune.search import Searcher

from dlm_ray.config import space as spaces
from dlm_ray.config.errors import UserError
from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.space import Settings
from dlm_ray.config.sweep import Dimension, Sweep
from dlm_ray.runtime.sweep.plan import METRIC

if TYPE_CHECKING:
    import optuna

NumberedSettings = tuple[int, Settings]
"""The number and the settings of a trial."""


class Listed(Searcher):
    """Suggests the trials of a list in order."""

    def __init__(self, trials: Sequence[NumberedSettings]):
        super().__init__()
        self.waiting = list(trials)

    def suggest(self, trial_id: str) -> JsonObject:
        """Return the next trial as {"number", "settings"}, or FINISHED."""
        if not self.waiting:
            return cast("JsonObject", Searcher.FINISHED)  # a string, which Ray's annotation leaves out
        number, settings = self.waiting.pop(0)
        return {"number": number, "settings": settings}

    def on_trial_complete(self, trial_id: str, result: JsonObject | None = None, error: bool = False) -> None:
        """Do nothing: a list does not learn."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a resumed sweep reads its trials from their own folders."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, as in `save`."""


class Tpe(Listed):
    """Suggests trials by Optuna's TPE (arXiv 1907.10902), which learns from the last bound of every trial.

    Args:
        sweep: gives the space and the seed.
        ended: (settings, bound or None if it failed) of trials of an earlier call that had ended.
        unfinished: trials of an earlier call that had begun; they are suggested first.
        first: number of the first new trial.

    Raises:
        UserError: if Optuna is not installed.
    """

    def __init__(
        self,
        sweep: Sweep,
        ended: Sequence[tuple[Settings, float | None]],
        unfinished: Sequence[NumberedSettings],
        first: int,
    ):
        super().__init__(unfinished)
        try:
            import optuna
        except ImportError as error:
            raise UserError(
                "search.name=optuna needs Optuna, which is not installed; run `pip install 'dlm-ray[sweep]'`, or set "
                "search.name=random"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._next = sweep.space, first
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=sweep.search.seed + len(ended)))
        self._running: dict[str, optuna.Trial] = {}
        for settings, value in ended:
            self._study.add_trial(self._as_trial(settings, value))

    def suggest(self, trial_id: str) -> JsonObject:
        """Return an unfinished trial, or a new one, as {"number", "settings"}."""
        if self.waiting:
            number, settings = self.waiting.pop(0)
            self._study.enqueue_trial(self._as_trial(settings, None).params)
        else:
            number, self._next = self._next, self._next + 1
        trial = self._study.ask()

        def pick(key: str, leaf: Dimension) -> object:
            name = _parameter_name(key, leaf)
            if leaf.values is not None:
                return leaf.values[trial.suggest_categorical(name, range(len(leaf.values)))]
            assert leaf.range is not None, "a leaf has values or a range"
            return trial.suggest_float(name, *leaf.range, log=leaf.loguniform is not None)

        self._running[trial_id] = trial
        return {"number": number, "settings": spaces.settings_of(self._space, pick)}

    def on_trial_complete(self, trial_id: str, result: JsonObject | None = None, error: bool = False) -> None:
        """Learn from the bound of a trial, or from its failure."""
        import optuna

        bound = None if error else (result or {}).get(METRIC)
        state = optuna.trial.TrialState.FAIL if bound is None else None
        self._study.tell(self._running[trial_id], bound, state=state)

    def _as_trial(self, settings: Settings, value: float | None) -> optuna.trial.FrozenTrial:
        """Return an ended trial in Optuna's terms; without a value it has failed."""
        import optuna

        parameters: dict[str, object] = {}
        distributions: dict[str, optuna.distributions.BaseDistribution] = {}

        def pick(key: str, leaf: Dimension) -> object:
            name, setting = _parameter_name(key, leaf), settings[key]
            if leaf.values is not None:
                parameters[name] = leaf.values.index(setting)
                distributions[name] = optuna.distributions.CategoricalDistribution(range(len(leaf.values)))
            else:
                assert leaf.range is not None, "a leaf has values or a range"
                is_log = leaf.loguniform is not None
                parameters[name] = setting
                distributions[name] = optuna.distributions.FloatDistribution(*leaf.range, log=is_log)
            return setting

        spaces.settings_of(self._space, pick)
        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        return optuna.trial.create_trial(params=parameters, distributions=distributions, value=value, state=state)


def _parameter_name(key: str, leaf: Dimension) -> str:
    """Return Optuna's name of a dimension; the cases of a key have different names, because their values differ."""
    return f"{key}:{spaces.digest(leaf.model_dump(mode='json'))}"
