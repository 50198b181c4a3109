"""The sweep: which keys of a recipe are tried with which values, how trials are chosen and stopped, and what they are judged by."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from dlm_ray.config.parts import ConfigNode, NonNegative, Positive

METRICS = {
    "bits_per_byte": "min",
    "nelbo_variance": "min",
    "gradient_variance": "min",
    "tokens_per_second": "max",
}
"""What is reported of every trial, and which way is better."""
Range = tuple[float, float]


class Dimension(ConfigNode):
    """The values of one key: exactly one of `grid`, `choice`, `uniform`, `loguniform` and `cases`. A value may be null (the key is left out) or a mapping."""

    grid: tuple[Any, ...] | None = None
    """Each of these is tried."""
    choice: tuple[Any, ...] | None = None
    """One of these is drawn, or chosen by Optuna."""
    uniform: Range | None = None
    """[low, high): drawn, or chosen by Optuna."""
    loguniform: Range | None = None
    """The same, evenly by factors."""
    by: str | None = None
    """With `cases`: the key of the space whose value decides."""
    cases: dict[str, Dimension] | None = None
    """By that key's value, its dimension; a value without a case leaves this key as the recipe has it."""

    @field_validator("cases", mode="before")
    @classmethod
    def _names(cls, cases: Any) -> Any:
        """YAML reads the case `4:` as a number."""
        return {case_name(value): dimension for value, dimension in cases.items()} if isinstance(cases, dict) else cases

    @property
    def values(self) -> tuple[Any, ...] | None:
        """Of a discrete dimension."""
        return self.grid if self.grid is not None else self.choice

    @property
    def range(self) -> Range | None:
        """Of a continuous one."""
        return self.uniform if self.uniform is not None else self.loguniform

    def contradictions(self, key: str) -> list[str]:
        """Mistakes in this dimension alone."""
        ways = [
            name for name in ("grid", "choice", "uniform", "loguniform", "cases") if getattr(self, name) is not None
        ]
        if len(ways) != 1:
            return [
                f"{key}: exactly one of grid, choice, uniform, loguniform and cases is needed, and it has {', '.join(ways) or 'none'}"
            ]
        if (self.by is None) != (self.cases is None):
            return [f"{key}: by names the key that cases depend on; set both or neither"]
        if self.values is not None and not self.values:
            return [f"{key}.{ways[0]} is empty: there is nothing to try; give at least one value, or remove the key"]
        repeated = [value for i, value in enumerate(self.grid or ()) if value in (self.grid or ())[:i]]
        if repeated:
            return [
                f"{key}.grid has {case_name(repeated[0])} twice: the same trial would be run again; give every value once"
            ]
        if self.cases is not None:
            if not self.cases:
                return [f"{key}.cases is empty: there is nothing to try; give at least one case, or remove the key"]
            found = [one for name, case in self.cases.items() for one in case.contradictions(f"{key}.cases.{name}")]
            nested = [name for name, case in self.cases.items() if case.cases is not None]
            return found + [
                f"{key}.cases.{name} has cases itself; allowed are grid, choice, uniform and loguniform"
                for name in nested
            ]
        if self.range is not None:
            low, high = self.range
            if not (low < high and (self.uniform is not None or low > 0)):
                limit = "0 < low < high" if self.loguniform is not None else "low < high"
                return [f"{key}.{ways[0]}=[{low:g}, {high:g}]; allowed is [low, high] with {limit}"]
        return []


class Search(ConfigNode):
    """How the trials are chosen from the space."""

    name: Literal["grid", "random", "optuna"] = "grid"
    """`grid`: every combination. `random`: for every combination of the grids, `trials` draws of the rest. `optuna`: `trials` by TPE."""
    trials: Positive | None = None
    seed: NonNegative = 0


class Scheduler(ConfigNode):
    """What becomes of trials while they run, by the bound that their validation reports (over all of t, never the clipped loss)."""

    name: Literal["none", "asha", "median", "pbt"] = "none"
    """`asha`, `median`: worse ones are stopped. `pbt`: worse ones go on as perturbed copies of better ones, all in step."""
    min_tokens: NonNegative = 0
    """`asha`, `median`: no trial is stopped before. On short runs the order by bound is not yet that of long ones."""
    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0
    """Of `asha`: one in so many goes on at every rung; rungs are at min_tokens times its powers."""
    every_steps: Positive | None = None
    """Of `pbt`: steps between exchanges, a multiple of validation.every_steps."""
    quantile: Annotated[float, Field(gt=0.0, le=0.5)] = 0.25
    """Of `pbt`: the share that is replaced, and the share that is copied."""
    resample_probability: Annotated[float, Field(ge=0.0, le=1.0)] = 0.25
    """Of `pbt`: a mutated value is drawn anew with this probability, else moved by a factor of 0.8 or 1.2, or to a neighbour."""


class Corpus(ConfigNode):
    """Data of the text that this machine has (the sources and the documentation of its Python), built in OUT/data: for laptops."""

    max_bytes: Positive | None = None
    vocab_size: Positive = 1024
    sequence_length: Positive = 128
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1


class StartFrom(ConfigNode):
    """A run that is made first, in OUT/base: the checkpoint that all trials start from."""

    recipe: str
    overrides: tuple[str, ...] = ()


class Measure(ConfigNode):
    """What every trial is measured on when it has ended: the same rows and the same draws for all."""

    sequences: Positive = 200
    """Held-out rows of the first source."""
    draws_per_sequence: Positive = 8
    variance_draws: Annotated[int, Field(ge=2)] = 8
    """Draws of each row of which the variance of a block's bound is taken, for `nelbo_variance` and its interval."""
    variance_sequences: Annotated[int, Field(ge=2)] = 64
    gradient_draws: NonNegative = 0
    """Draws of a batch for `gradient_variance`, a backward pass each; 0 leaves it out."""
    gradient_sequences: Positive = 8


class Confirm(ConfigNode):
    """The best trial, of each value of `rank_by`, is run once more, longer."""

    overrides: Annotated[tuple[str, ...], Field(min_length=1)]
    """Of its recipe, such as training.steps=1000."""


class Sweep(ConfigNode):
    """One question: which settings of a recipe are best."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    recipe: str
    """A file, or the name of a shipped one: what all trials share."""
    overrides: tuple[str, ...] = ()
    """Of the recipe, as on the command line of `dlm-ray train`; `parallelism` says what one trial gets."""
    corpus: Corpus | None = None
    start_from: StartFrom | None = None
    space: dict[str, Dimension]
    """By key of the recipe."""
    metric: Literal["bits_per_byte", "nelbo_variance", "gradient_variance", "tokens_per_second"] = "bits_per_byte"
    """`nelbo_variance` is of a block's bound, at common draws: clips are compared by it, with the bound beside."""
    mode: Literal["min", "max"] = "min"
    rank_by: str | None = None
    """A key of the space: trials are compared among those that share its value, as variances only are at one block size."""
    search: Search = Search()
    scheduler: Scheduler = Scheduler()
    trials_at_once: Positive = 1
    measure: Measure = Measure()
    confirm: Confirm | None = None

    def contradictions(self) -> list[str]:
        """Every mistake that involves more than one key, each with its fix; the keys of the space are checked beside the recipe."""
        found = [one for key, dimension in self.space.items() for one in dimension.contradictions(f"space.{key}")]
        if not self.space:
            found.append(
                "space is empty: there is nothing to try; give it a key of the recipe, such as optimizer.learning_rate: {grid: [1e-4, 3e-4]}"
            )
        if found:
            return found
        if self.mode != METRICS[self.metric]:
            found.append(
                f"mode={self.mode} with metric={self.metric}, of which the {METRICS[self.metric]} is best; set mode: {METRICS[self.metric]}"
            )
        if self.measure.gradient_draws == 1:
            found.append("measure.gradient_draws=1: a variance needs at least 2 draws; 0 leaves it out")
        elif self.metric == "gradient_variance" and self.measure.gradient_draws < 2:
            found.append(
                f"metric=gradient_variance is not measured with measure.gradient_draws={self.measure.gradient_draws}; set that to at least 2, or "
                "choose another metric"
            )
        for key, dimension in self.space.items():
            found += self._case_contradictions(key, dimension)
        discrete = [key for key, dimension in self.space.items() if dimension.values is not None]
        if self.rank_by is not None and self.rank_by not in discrete:
            found.append(
                f"rank_by={self.rank_by}; allowed are the keys of the space with grid or choice: {', '.join(discrete) or 'none'}"
            )
        return found + self._search_contradictions()

    def _case_contradictions(self, key: str, dimension: Dimension) -> list[str]:
        if dimension.by is None or dimension.cases is None:
            return []
        parent = self.space.get(dimension.by)
        values = parent.values if parent is not None else None
        if values is None:
            discrete = [name for name, one in self.space.items() if one.values is not None]
            return [
                f"space.{key}.by={dimension.by}; allowed are the keys of the space with grid or choice: {', '.join(discrete) or 'none'}"
            ]
        allowed = [case_name(value) for value in values]
        unknown = [name for name in dimension.cases if name not in allowed]
        return [
            f"space.{key}.cases.{name} is no value of {dimension.by}; allowed are {', '.join(allowed)}"
            for name in unknown
        ]

    def _search_contradictions(self) -> list[str]:
        found = []
        search, scheduler = self.search, self.scheduler
        leaves = [
            (key, leaf) for key, one in self.space.items() for leaf in (one.cases.values() if one.cases else (one,))
        ]
        drawn = sorted({key for key, leaf in leaves if leaf.grid is None})
        if search.name == "grid" and drawn:
            found.append(
                f"search.name=grid tries every value, and {', '.join(drawn)} are drawn; give them a grid, or set search.name=random"
            )
        if search.name == "random" and not drawn:
            found.append(
                "search.name=random has nothing to draw, because every key of the space is a grid; set search.name=grid"
            )
        if (search.name == "grid") != (search.trials is None):
            found.append(
                f"search.trials={search.trials} with search.name={search.name}: random and optuna need it, and grid has none"
            )
        if search.name == "optuna" and self.metric != "bits_per_byte":
            found.append(
                f"search.name=optuna learns from the bound alone, and metric={self.metric}; set metric: bits_per_byte, or search.name=random"
            )
        if scheduler.name in ("asha", "median") and scheduler.min_tokens == 0:
            found.append(
                f"scheduler.min_tokens=0 with scheduler.name={scheduler.name}: a trial would be stopped by its first bound; set it"
            )
        if scheduler.name == "pbt":
            if scheduler.every_steps is None:
                found.append("scheduler.every_steps is missing: pbt exchanges every so many steps; set it")
            if search.name == "optuna":
                found.append("scheduler.name=pbt changes settings on its own; set search.name=random or grid")
            if self.metric != "bits_per_byte":
                found.append(
                    f"scheduler.name=pbt selects by the bound, and metric={self.metric}; set metric: bits_per_byte"
                )
            for key, leaf in leaves:
                if leaf.grid is None and not key.startswith("optimizer."):
                    found.append(
                        f"space.{key} would change in the middle of a run of pbt; allowed are keys of optimizer, and others with a grid, which stay"
                    )
            if not any(leaf.grid is None for _, leaf in leaves):
                found.append(
                    "scheduler.name=pbt has nothing to perturb: give a key of optimizer choice, uniform or loguniform"
                )
        elif scheduler.every_steps is not None:
            found.append(
                f"scheduler.every_steps={scheduler.every_steps} is of pbt, and scheduler.name={scheduler.name}; remove it"
            )
        return found


def case_name(value: Any) -> str:
    """How a value is written as a case: as YAML would, so that true and null have their names."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
