"""Checks of a sweep that involve more than one key; each message has the values and the key to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlm_ray.config.sweep import Dimension, Sweep

METRICS = {
    "bits_per_byte": "min",
    "nelbo_variance": "min",
    "gradient_variance": "min",
    "tokens_per_second": "max",
}
"""What is reported of every trial, and whether the lowest or the highest value is best."""


def case_name(value: object) -> str:
    """Return a value as the name of a case, as YAML writes it: `true`, `null`, `4`."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def contradictions(sweep: Sweep) -> list[str]:
    """Return every mistake that involves more than one key, each with its fix; empty if there is none."""
    problems = [
        problem for key, dimension in sweep.space.items() for problem in dimension_problems(dimension, f"space.{key}")
    ]
    if not sweep.space:
        problems.append(
            "space is empty: there is nothing to try; give it a key of the recipe, such as "
            "optimizer.learning_rate: {grid: [1e-4, 3e-4]}"
        )
    return problems or [
        *_metric(sweep),
        *(problem for key, dimension in sweep.space.items() for problem in _cases(sweep, key, dimension)),
        *_rank_by(sweep),
        *_search(sweep),
        *_scheduler(sweep),
    ]


def dimension_problems(dimension: Dimension, key: str) -> list[str]:
    """Return the mistakes within one dimension; `key` is its place, for messages."""
    kinds = [
        name for name in ("grid", "choice", "uniform", "loguniform", "cases") if getattr(dimension, name) is not None
    ]
    if len(kinds) != 1:
        return [
            f"{key}: exactly one of grid, choice, uniform, loguniform and cases is needed, and it has "
            f"{', '.join(kinds) or 'none'}"
        ]
    if (dimension.by is None) != (dimension.cases is None):
        return [f"{key}: by names the key that cases depend on; set both or neither"]
    if dimension.values is not None and not dimension.values:
        return [f"{key}.{kinds[0]} is empty: there is nothing to try; give at least one value, or remove the key"]
    grid = dimension.grid or ()
    repeated = [value for i, value in enumerate(grid) if value in grid[:i]]
    if repeated:
        return [f"{key}.grid has {case_name(repeated[0])} twice: the same trial would run again; give every value once"]
    if dimension.cases is not None:
        return _case_problems(dimension.cases, f"{key}.cases")
    if dimension.range is not None:
        low, high = dimension.range
        if not (low < high and (dimension.uniform is not None or low > 0)):
            limit = "0 < low < high" if dimension.loguniform is not None else "low < high"
            return [f"{key}.{kinds[0]}=[{low:g}, {high:g}]; allowed is [low, high] with {limit}"]
    return []


def _case_problems(cases: dict[str, Dimension], key: str) -> list[str]:
    if not cases:
        return [f"{key} is empty: there is nothing to try; give at least one case, or remove the key"]
    problems = [problem for name, case in cases.items() for problem in dimension_problems(case, f"{key}.{name}")]
    nested = [name for name, case in cases.items() if case.cases is not None]
    return problems + [
        f"{key}.{name} has cases itself; allowed are grid, choice, uniform and loguniform" for name in nested
    ]


def _discrete_keys(sweep: Sweep) -> str:
    return ", ".join(key for key, dimension in sweep.space.items() if dimension.values is not None) or "none"


def _metric(sweep: Sweep) -> list[str]:
    problems = []
    if sweep.mode != METRICS[sweep.metric]:
        best = METRICS[sweep.metric]
        problems.append(f"mode={sweep.mode} with metric={sweep.metric}, whose {best} is best; set mode: {best}")
    if sweep.metric == "gradient_variance" and sweep.measure.gradient_draws < 2:
        problems.append(
            f"metric=gradient_variance is not measured with measure.gradient_draws={sweep.measure.gradient_draws}; set "
            "that to at least 2, or choose another metric"
        )
    return problems


def _cases(sweep: Sweep, key: str, dimension: Dimension) -> list[str]:
    """Check that the cases of a dimension are values of the key that they depend on."""
    if dimension.by is None or dimension.cases is None:
        return []
    parent = sweep.space.get(dimension.by)
    if parent is None or parent.values is None:
        return [
            f"space.{key}.by={dimension.by}; allowed are the keys of the space with grid or choice: "
            f"{_discrete_keys(sweep)}"
        ]
    allowed = [case_name(value) for value in parent.values]
    return [
        f"space.{key}.cases.{name} is not a value of {dimension.by}; allowed are {', '.join(allowed)}"
        for name in dimension.cases
        if name not in allowed
    ]


def _rank_by(sweep: Sweep) -> list[str]:
    parent = None if sweep.rank_by is None else sweep.space.get(sweep.rank_by)
    if sweep.rank_by is None or (parent is not None and parent.values is not None):
        return []
    return [f"rank_by={sweep.rank_by}; allowed are the keys of the space with grid or choice: {_discrete_keys(sweep)}"]


def _sampled_keys(sweep: Sweep) -> list[str]:
    """Return the keys with a dimension that is not a grid."""
    return sorted(key for key, one in sweep.space.items() if any(leaf.grid is None for leaf in one.leaves))


def _search(sweep: Sweep) -> list[str]:
    problems = []
    search, sampled = sweep.search, _sampled_keys(sweep)
    if search.name == "grid" and sampled:
        problems.append(
            f"search.name=grid tries every value, and {', '.join(sampled)} have no grid; give them one, or set "
            "search.name=random"
        )
    if search.name == "random" and not sampled:
        problems.append(
            "search.name=random has nothing to sample, because every key of the space is a grid; set search.name=grid"
        )
    if (search.name == "grid") != (search.trials is None):
        problems.append(
            f"search.trials={search.trials} with search.name={search.name}: random and optuna need it, and grid must "
            "not have it"
        )
    if search.name == "optuna" and sweep.metric != "bits_per_byte":
        problems.append(
            f"search.name=optuna learns from the bound only, and metric={sweep.metric}; set metric: bits_per_byte, or "
            "search.name=random"
        )
    return problems


def _scheduler(sweep: Sweep) -> list[str]:
    scheduler = sweep.scheduler
    if scheduler.name in ("asha", "median") and scheduler.min_tokens == 0:
        return [
            f"scheduler.min_tokens=0 with scheduler.name={scheduler.name}: the first bound would stop a trial; set it",
            *_exchange_without_pbt(sweep),
        ]
    return _pbt(sweep) if scheduler.name == "pbt" else _exchange_without_pbt(sweep)


def _exchange_without_pbt(sweep: Sweep) -> list[str]:
    every, name = sweep.scheduler.every_steps, sweep.scheduler.name
    if every is None:
        return []
    return [f"scheduler.every_steps={every} is for pbt, and scheduler.name={name}; remove it"]


def _pbt(sweep: Sweep) -> list[str]:
    problems = []
    if sweep.scheduler.every_steps is None:
        problems.append("scheduler.every_steps is missing: pbt exchanges trials at this interval; set it")
    if sweep.search.name == "optuna":
        problems.append("scheduler.name=pbt changes settings by itself; set search.name=random or grid")
    if sweep.metric != "bits_per_byte":
        problems.append(
            f"scheduler.name=pbt selects by the bound, and metric={sweep.metric}; set metric: bits_per_byte"
        )
    sampled = _sampled_keys(sweep)
    problems += [
        f"space.{key} would change in the middle of a pbt run; allowed are keys of optimizer, and others with a grid, "
        "which stay constant"
        for key in sampled
        if not key.startswith("optimizer.")
    ]
    if not sampled:
        problems.append(
            "scheduler.name=pbt has nothing to perturb: give a key of optimizer choice, uniform or loguniform"
        )
    return problems
