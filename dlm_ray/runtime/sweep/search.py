"""What Ray Tune is told to try next: a list that is known before, or Optuna's tree-structured Parzen estimator over a conditional space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dlm_ray.runtime import cluster  # noqa: F401  first of all: it sets what Ray reads when it is imported

# isort: split
from ray.tune.search import Searcher

from dlm_ray.config import space as spaces
from dlm_ray.config.errors import UserError
from dlm_ray.config.space import Settings
from dlm_ray.config.sweep import Dimension, Sweep


class Listed(Searcher):
    """Trials in the order of a list."""

    def __init__(self, trials: Sequence[tuple[int, Settings]]):
        super().__init__()
        self.waiting = list(trials)

    def suggest(self, trial_id: str) -> Any:
        """The next one."""
        if not self.waiting:
            return Searcher.FINISHED
        number, settings = self.waiting.pop(0)
        return {"number": number, "settings": settings}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing is learned."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep that goes on reads its trials from their own folders."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class Tpe(Listed):
    """Optuna's TPE (arXiv 1907.10902), by the last bound of every trial; it learns from trials of an earlier call, too.

    Args:
        sweep: its space and search.
        ended: (settings, bound or None if it failed) of trials that had ended before.
        unfinished: trials of an earlier call that had begun.
        first: the number of the first new trial.

    Raises:
        UserError: if Optuna is not installed.
    """

    def __init__(
        self,
        sweep: Sweep,
        ended: Sequence[tuple[Settings, float | None]],
        unfinished: Sequence[tuple[int, Settings]],
        first: int,
    ):
        super().__init__(unfinished)
        try:
            import optuna
        except ImportError as error:
            raise UserError(
                "search.name=optuna needs Optuna, which is not installed; `pip install 'dlm-ray[sweep]'`, or set search.name=random"
            ) from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space, self._next = sweep.space, first
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=sweep.search.seed + len(ended)))
        self._asked: dict[str, Any] = {}
        for settings, value in ended:
            self._study.add_trial(self._as_trial(settings, value))

    def suggest(self, trial_id: str) -> Any:
        """An unfinished one, or a new one."""
        if self.waiting:
            number, settings = self.waiting.pop(0)
            self._study.enqueue_trial(self._as_trial(settings, None).params)
        else:
            number, self._next = self._next, self._next + 1
        asked = self._study.ask()

        def pick(key: str, leaf: Dimension) -> Any:
            name = _name(key, leaf)
            if leaf.values is not None:
                return leaf.values[asked.suggest_categorical(name, range(len(leaf.values)))]
            assert leaf.range is not None, "a leaf has values or a range"
            return asked.suggest_float(name, *leaf.range, log=leaf.loguniform is not None)

        self._asked[trial_id] = asked
        return {"number": number, "settings": spaces.settings_of(self._space, pick)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Learns the bound."""
        import optuna

        bound = (result or {}).get("bits_per_byte")
        failed = optuna.trial.TrialState.FAIL
        self._study.tell(
            self._asked[trial_id], None if error else bound, state=failed if error or bound is None else None
        )

    def _as_trial(self, settings: Settings, value: float | None) -> Any:
        import optuna

        params: dict[str, Any] = {}
        kinds: dict[str, Any] = {}

        def pick(key: str, leaf: Dimension) -> Any:
            name, chosen = _name(key, leaf), settings[key]
            if leaf.values is not None:
                params[name], kinds[name] = (
                    leaf.values.index(chosen),
                    optuna.distributions.CategoricalDistribution(range(len(leaf.values))),
                )
            else:
                assert leaf.range is not None, "a leaf has values or a range"
                params[name], kinds[name] = (
                    chosen,
                    optuna.distributions.FloatDistribution(*leaf.range, log=leaf.loguniform is not None),
                )
            return chosen

        spaces.settings_of(self._space, pick)
        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        return optuna.trial.create_trial(params=params, distributions=kinds, value=value, state=state)


def _name(key: str, leaf: Dimension) -> str:
    """Of a parameter: a key has another one in every case, because its values are others."""
    return f"{key}:{spaces.digest(leaf.model_dump(mode='json'))}"
