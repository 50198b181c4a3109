"""The trials of a sweep's space: combinations of a grid, random samples, and the corners that are checked."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping

from dlm_ray.config.sweep import Dimension, Sweep
from dlm_ray.config.sweep_checks import case_name
from dlm_ray.config.trees import Tree, set_key

Settings = dict[str, object]
"""Values by recipe key; None removes the key."""


def settings_of(space: Mapping[str, Dimension], pick: Callable[[str, Dimension], object]) -> Settings:
    """Return one point of the space.

    Args:
        space: dimensions by recipe key.
        pick: chooses the value of each dimension that applies; keys that cases depend on come first.
    """
    settings: Settings = {}
    for key, dimension in _parents_first(space):
        leaf = _applying(dimension, settings)
        if leaf is not None:
            settings[key] = pick(key, leaf)
    return {key: settings[key] for key in space if key in settings}


def combinations(
    space: Mapping[str, Dimension], values_of: Callable[[Dimension], tuple[object, ...]]
) -> Iterator[Settings]:
    """Yield every combination of the values that `values_of` returns per dimension; keys without any are left out."""
    partial: list[Settings] = [{}]
    for key, dimension in _parents_first(space):
        extended = []
        for settings in partial:
            leaf = _applying(dimension, settings)
            values = values_of(leaf) if leaf is not None else ()
            extended += [{**settings, key: value} for value in values] or [settings]
        partial = extended
    yield from ({key: settings[key] for key in space if key in settings} for settings in partial)


def corners(space: Mapping[str, Dimension], limit: int) -> list[Settings]:
    """Return every combination of discrete values with all ends of ranges, and with a value inside of each range.

    If there are more than `limit`, `limit + 1` of them are returned.
    """
    ends = combinations(space, lambda leaf: leaf.values if leaf.values is not None else leaf.range or ())
    inside = combinations(space, lambda leaf: leaf.values if leaf.values is not None else (_inside(leaf),))
    has_ranges = any(leaf.range for dimension in space.values() for leaf in dimension.leaves)
    return list(itertools.islice(itertools.chain(ends, inside if has_ranges else ()), limit + 1))


def _inside(leaf: Dimension) -> float:
    """Return a number inside of a range that is not whole, so that ranges for integer keys are refused."""
    assert leaf.range is not None, "a leaf has values or a range"
    low, high = leaf.range
    return low + (math.sqrt(5) - 1) / 2 * (high - low)


def trials(sweep: Sweep) -> list[Settings]:
    """Return the trials that are known before the sweep starts (all but Optuna's); they depend on search.seed only."""
    grids = list(combinations(sweep.space, lambda leaf: leaf.grid or ()))
    if sweep.search.name == "grid":
        return grids
    rng = random.Random(sweep.search.seed)

    def sampled(fixed: Settings) -> Settings:
        return settings_of(sweep.space, lambda key, leaf: fixed[key] if leaf.grid is not None else sample(leaf, rng))

    count = len(grids) * (sweep.search.trials or 0)
    return [sampled(grids[number % len(grids)]) for number in range(count)]


def sample(leaf: Dimension, rng: random.Random) -> object:
    """Return a random value of a dimension."""
    if leaf.values is not None:
        return rng.choice(leaf.values)
    assert leaf.range is not None, "a leaf has values or a range"
    low, high = leaf.range
    is_log = leaf.loguniform is not None
    value = math.exp(rng.uniform(math.log(low), math.log(high))) if is_log else rng.uniform(low, high)
    return min(max(value, low), high)  # exp(log(high)) may be larger than high


def apply(tree: Tree, settings: Settings) -> tuple[Tree, list[str]]:
    """Return a copy of a recipe's tree with the settings applied, and what could not be set."""
    applied = copy.deepcopy(tree)
    overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]
    return applied, [problem for override in overrides for problem in set_key(applied, override)]


def label(settings: Settings) -> str:
    """Return the settings for display, with the last part of each key: `block_tokens 4, clip [0.3, 0.8]`."""
    return ", ".join(f"{key.rpartition('.')[2]} {shown(value)}" for key, value in settings.items())


def digest(settings: Settings) -> str:
    """Return 8 hexadecimal digits that identify the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def shown(value: object) -> str:
    """Return a value for display; a clip is shown as its interval."""
    if isinstance(value, dict):
        if set(value) >= {"beta", "omega"}:
            return f"[{value['beta']:g}, {value['omega']:g}]"
        return "/".join(shown(part) for part in value.values())
    if isinstance(value, list | tuple):
        return " ".join(shown(part) for part in value) or "none"
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else case_name(value)


def _parents_first(space: Mapping[str, Dimension]) -> list[tuple[str, Dimension]]:
    """Return the dimensions in order, those with cases last."""
    return sorted(space.items(), key=lambda item: item[1].by is not None)  # the sort is stable


def _applying(dimension: Dimension, settings: Settings) -> Dimension | None:
    """Return the dimension itself, or the case that the settings select; None if no case applies."""
    if dimension.by is None or dimension.cases is None:
        return dimension
    return dimension.cases.get(case_name(settings[dimension.by])) if dimension.by in settings else None
