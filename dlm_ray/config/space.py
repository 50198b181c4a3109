"""A space's trials: every combination of a grid, draws, and the corners that a recipe has to be valid at."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dlm_ray.config.load import set_key
from dlm_ray.config.sweep import Dimension, Sweep, case_name

Settings = dict[str, Any]
"""By key of the recipe; None takes the key away."""


def settings_of(space: Mapping[str, Dimension], pick: Callable[[str, Dimension], Any]) -> Settings:
    """One point of the space: `pick` chooses a value from every dimension that applies, those that decide about others first."""
    chosen: Settings = {}
    for key, dimension in _ordered(space):
        leaf = _applying(dimension, chosen)
        if leaf is not None:
            chosen[key] = pick(key, leaf)
    return {key: chosen[key] for key in space if key in chosen}


def combinations(
    space: Mapping[str, Dimension], values_of: Callable[[Dimension], tuple[Any, ...]]
) -> Iterator[Settings]:
    """Every combination of the values that `values_of` gives each dimension; where it gives none, the key is left out."""
    partial: list[Settings] = [{}]
    for key, dimension in _ordered(space):
        grown = []
        for chosen in partial:
            leaf = _applying(dimension, chosen)
            values = values_of(leaf) if leaf is not None else ()
            grown += [{**chosen, key: value} for value in values] or [chosen]
        partial = grown
    yield from ({key: chosen[key] for key in space if key in chosen} for chosen in partial)


def corners(space: Mapping[str, Dimension], most: int) -> list[Settings]:
    """Every combination of discrete values, with ranges at their ends, and with all of them within; one more than `most` if there are more."""
    ends = combinations(space, lambda leaf: leaf.values if leaf.values is not None else leaf.range or ())
    inside = combinations(space, lambda leaf: leaf.values if leaf.values is not None else (_inside(leaf),))
    has_ranges = any(leaf.range for one in space.values() for leaf in (one.cases.values() if one.cases else (one,)))
    return list(itertools.islice(itertools.chain(ends, inside if has_ranges else ()), most + 1))


def _inside(leaf: Dimension) -> float:
    """A number of a range that is no end of it, and no round one: a key of whole numbers has no use for a range."""
    assert leaf.range is not None, "a leaf has values or a range"
    low, high = leaf.range
    return low + (math.sqrt(5) - 1) / 2 * (high - low)


def trials(sweep: Sweep) -> list[Settings]:
    """The trials of a sweep that are known before it starts (all but Optuna's), by search.seed alone."""
    grids = list(combinations(sweep.space, lambda leaf: leaf.grid or ()))
    if sweep.search.name == "grid":
        return grids
    draws = random.Random(sweep.search.seed)
    found = []
    for number in range(len(grids) * (sweep.search.trials or 0)):
        found.append(settings_of(sweep.space, _Drawing(grids[number % len(grids)], draws)))
    return found


@dataclass(frozen=True)
class _Drawing:
    """Picks the grids' values as they are fixed, and the others by chance."""

    fixed: Settings
    draws: random.Random

    def __call__(self, key: str, leaf: Dimension) -> Any:
        return self.fixed[key] if leaf.grid is not None else draw(leaf, self.draws)


def draw(leaf: Dimension, draws: random.Random) -> Any:
    """A value of a dimension by chance."""
    if leaf.values is not None:
        return draws.choice(leaf.values)
    assert leaf.range is not None, "a leaf has values or a range"
    low, high = leaf.range
    drawn = (
        draws.uniform(low, high) if leaf.uniform is not None else math.exp(draws.uniform(math.log(low), math.log(high)))
    )
    return min(max(drawn, low), high)  # rounding may take a logarithm's exponential beyond an end


def apply(tree: dict[str, Any], settings: Settings) -> tuple[dict[str, Any], list[str]]:
    """A copy of a recipe's tree with the settings in it, and what could not be set."""
    own = copy.deepcopy(tree)
    problems = [
        problem
        for key, value in settings.items()
        for problem in set_key(own, f"{key}={json.dumps(value, ensure_ascii=False)}")
    ]
    return own, problems


def label(settings: Settings) -> str:
    """The settings for people, by the last part of each key."""
    return ", ".join(f"{key.rpartition('.')[2]} {shown(value)}" for key, value in settings.items())


def digest(settings: Settings) -> str:
    """8 hexadecimal digits of the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _ordered(space: Mapping[str, Dimension]) -> list[tuple[str, Dimension]]:
    return sorted(space.items(), key=lambda item: item[1].by is not None)  # stable: those with cases come last


def _applying(dimension: Dimension, chosen: Settings) -> Dimension | None:
    """The dimension itself, or its case; None where no case applies."""
    if dimension.by is None or dimension.cases is None:
        return dimension
    return dimension.cases.get(case_name(chosen[dimension.by])) if dimension.by in chosen else None


def shown(value: Any) -> str:
    """A value for people; a clip as its interval."""
    if isinstance(value, dict):
        if set(value) >= {"beta", "omega"}:
            return f"[{value['beta']:g}, {value['omega']:g}]"
        return "/".join(shown(part) for part in value.values())
    if isinstance(value, list | tuple):
        return " ".join(shown(part) for part in value) or "none"
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else case_name(value)
