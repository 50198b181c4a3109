"""The sweep: which recipe keys take which values, and how trials are chosen, stopped and judged."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from dlm_ray.config import sweep_checks
from dlm_ray.config.parts import ConfigNode, NonNegative, Positive
from dlm_ray.config.sweep_checks import case_name

Range = tuple[float, float]


class Dimension(ConfigNode):
    """The values of one key: exactly one of `grid`, `choice`, `uniform`, `loguniform` and `cases`.

    A value may be null, which removes the key from the recipe, or a mapping.
    """

    grid: tuple[object, ...] | None = None
    """Values that are all tried."""
    choice: tuple[object, ...] | None = None
    """Values of which each trial takes one, at random or by Optuna."""
    uniform: Range | None = None
    """[low, high) of a continuous value, at random or by Optuna."""
    loguniform: Range | None = None
    """[low, high) of a continuous value whose logarithm is uniform; 0 < low."""
    by: str | None = None
    """With `cases`: the key of the space whose value selects the case."""
    cases: dict[str, Dimension] | None = None
    """The dimension of this key for each value of the key `by`. For a value without a case, the key stays as in the
    recipe."""

    @field_validator("cases", mode="before")
    @classmethod
    def _names(cls, cases: object) -> object:
        """Turn the names of cases into strings; YAML reads the case `4:` as a number."""
        return {case_name(value): dimension for value, dimension in cases.items()} if isinstance(cases, dict) else cases

    @property
    def values(self) -> tuple[object, ...] | None:
        """Values of a discrete dimension, else None."""
        return self.grid if self.grid is not None else self.choice

    @property
    def range(self) -> Range | None:
        """Bounds of a continuous dimension, else None."""
        return self.uniform if self.uniform is not None else self.loguniform

    @property
    def leaves(self) -> tuple[Dimension, ...]:
        """The dimensions that have values: those of the cases, or this one."""
        return tuple(self.cases.values()) if self.cases else (self,)


class Search(ConfigNode):
    """How trials are chosen from the space."""

    name: Literal["grid", "random", "optuna"] = "grid"
    """`grid`: every combination. `random`: for every combination of the grids, `trials` random samples of the other
    dimensions. `optuna`: `trials` trials by the tree-structured Parzen estimator."""
    trials: Positive | None = None
    """Number of trials; needed by `random` and `optuna`."""
    seed: NonNegative = 0
    """Seed of `random` and `optuna`."""


class Scheduler(ConfigNode):
    """What happens to running trials, judged by their validation bound (over all of t, never the clipped loss)."""

    name: Literal["none", "asha", "median", "pbt"] = "none"
    """`asha` and `median` stop worse trials. `pbt` (population-based training) replaces worse trials by perturbed
    copies of better ones, all at the same step."""
    min_tokens: NonNegative = 0
    """Training tokens before `asha` or `median` may stop a trial. The order by bound of short runs is often not that of
    long ones."""
    reduction_factor: Annotated[float, Field(gt=1.0)] = 3.0
    """`asha`: one in this many trials passes each rung; the rungs are at `min_tokens` times the powers of it."""
    every_steps: Positive | None = None
    """`pbt`: steps between two exchanges; a multiple of the recipe's validation.every_steps."""
    quantile: Annotated[float, Field(gt=0.0, le=0.5)] = 0.25
    """`pbt`: share of the trials that is replaced, and share that is copied."""
    resample_probability: Annotated[float, Field(ge=0.0, le=1.0)] = 0.25
    """`pbt`: probability that a mutated value is sampled again; else it is multiplied by 0.8 or 1.2, or moves to a
    neighbouring choice."""


class Corpus(ConfigNode):
    """Data built in OUT/data from text on this machine (sources and documentation of its Python), for laptops."""

    max_bytes: Positive | None = None
    """Bytes of text; all of it by default."""
    vocab_size: Positive = 1024
    """Tokens of the tokenizer, which is trained on the text."""
    sequence_length: Positive = 128
    """Tokens of a packed sequence."""
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the documents that is kept for evaluation."""


class StartFrom(ConfigNode):
    """A run in OUT/base before all trials; they start from its checkpoint."""

    recipe: str
    """File or shipped name of the run's recipe."""
    overrides: tuple[str, ...] = ()
    """Overrides of that recipe, such as training.steps=300."""


class Measure(ConfigNode):
    """How each finished trial is measured: on the same sequences and draws for all."""

    sequences: Positive = 200
    """Held-out sequences of the first source for the bound."""
    draws_per_sequence: Positive = 8
    """Draws of (t, mask) per sequence for the bound."""
    variance_draws: Annotated[int, Field(ge=2)] = 8
    """Draws per sequence for `nelbo_variance`, the variance of a block's bound over draws."""
    variance_sequences: Annotated[int, Field(ge=2)] = 64
    """Held-out sequences for `nelbo_variance`."""
    gradient_draws: NonNegative = 0
    """Draws of a batch for `gradient_variance`, one backward pass each; 0 leaves it out."""
    gradient_sequences: Positive = 8
    """Sequences of that batch."""


class Confirm(ConfigNode):
    """A longer run of the best trial, or of the best trial for each value of `rank_by`."""

    overrides: Annotated[tuple[str, ...], Field(min_length=1)]
    """Overrides of the best trial's recipe, such as training.steps=1000."""


class Sweep(ConfigNode):
    """A search for the best settings of a recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the sweep; it is also the tracking group of the trials."""
    recipe: str
    """File or shipped name of the recipe that all trials share."""
    overrides: tuple[str, ...] = ()
    """Overrides of the recipe, as for `dlm-ray train`; `parallelism` sets the resources of one trial."""
    corpus: Corpus | None = None
    """Data that the sweep builds itself; by default the recipe's data."""
    start_from: StartFrom | None = None
    """Base that the sweep trains itself; by default the recipe's base or architecture."""
    space: dict[str, Dimension]
    """Values to try, by recipe key."""
    metric: Literal["bits_per_byte", "nelbo_variance", "gradient_variance", "tokens_per_second"] = "bits_per_byte"
    """What trials are ranked by. `nelbo_variance` is the variance of a block's bound at common draws; it compares
    clips, and the bound is reported with it."""
    mode: Literal["min", "max"] = "min"
    """Whether the lowest or the highest metric is best."""
    rank_by: str | None = None
    """Key of the space: trials are compared only with trials of the same value, because variances of different block
    sizes are not comparable."""
    search: Search = Search()
    """How trials are chosen."""
    scheduler: Scheduler = Scheduler()
    """How trials are stopped or copied."""
    trials_at_once: Positive = 1
    """Trials that run concurrently."""
    measure: Measure = Measure()
    """How finished trials are measured."""
    confirm: Confirm | None = None
    """A longer run of the winner; none by default."""

    def contradictions(self) -> list[str]:
        """Return every mistake that involves more than one key, each with its fix.

        Keys of the space are checked against the recipe when the sweep is loaded.
        """
        return sweep_checks.contradictions(self)
