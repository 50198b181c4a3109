"""Sweeps from YAML and `key=value`: the sweep, its recipe, and every corner of its space, before anything starts."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from dlm_ray.config import space as spaces
from dlm_ray.config.errors import UserError
from dlm_ray.config.load import all_keys, listed, load_recipe, read_tree, readable, set_key, validate
from dlm_ray.config.recipe import Recipe
from dlm_ray.config.space import Settings
from dlm_ray.config.sweep import Sweep

MOST_CORNERS = 5000
# Until the sweep has built its own data and trained its own base, these stand in the recipe for them.
_DATA, _BASE = "the-data-of-the-sweep", "the-base-of-the-sweep"


@dataclass(frozen=True)
class Loaded:
    """A sweep that is free of mistakes."""

    sweep: Sweep
    tree: dict[str, Any]
    """Of the recipe, before any setting."""

    def recipe(
        self, settings: Settings, data: str | None = None, base: str | None = None, overrides: Sequence[str] = ()
    ) -> Recipe:
        """The recipe of a trial.

        Args:
            settings: of the trial.
            data, base: the sweep's own, once they are there.
            overrides: of a confirming run.

        Raises:
            UserError: if it is no valid recipe.
        """
        own, problems = spaces.apply(self.tree, settings)
        more = [*_places(self.sweep, data or _DATA, base or _BASE), *overrides]
        problems += [problem for one in more for problem in set_key(own, one)]
        where = f"{self.sweep.name} with {spaces.label(settings)}"
        if problems:
            raise UserError(listed(where, problems))
        validate(own, where)  # before anything is looked up in it
        if self.sweep.scheduler.name != "none":
            own = _checkpointed(own, keep_all=self.sweep.scheduler.name == "pbt")
        own = {**own, "tracking": {"group": self.sweep.name, **own.get("tracking", {})}}
        return validate(own, where)


def load_sweep(path: str, overrides: Sequence[str] = ()) -> Loaded:
    """The sweep in a YAML file or of a shipped name, with overrides on top: of the sweep where it has such a key, else of its recipe.

    Raises:
        UserError: with every mistake that was found.
    """
    own = [one for one in overrides if one.partition("=")[0].partition(".")[0] in Sweep.model_fields]
    tree = read_tree(path, own, kind="sweep")
    for_recipe = [one for one in overrides if one not in own]
    if for_recipe:
        tree["overrides"] = [*tree.get("overrides", ()), *for_recipe]
    try:
        sweep = Sweep.model_validate(tree)
    except ValidationError as error:
        raise UserError(listed(path, list(readable(error, Sweep)))) from error
    problems = sweep.contradictions() + [problem for key in sweep.space for problem in _unknown_key(key)]
    if problems:
        raise UserError(listed(path, problems))
    loaded = Loaded(sweep, _recipe_tree(sweep))
    _check_corners(loaded, path)
    if sweep.start_from is not None:
        start_recipe(sweep, _DATA)
    return loaded


def start_recipe(sweep: Sweep, data: str | None) -> Recipe:
    """The recipe of the run that all trials start from."""
    assert sweep.start_from is not None, "the sweep makes its own base"
    places = [_source(data)] if sweep.corpus is not None and data is not None else []
    return load_recipe(sweep.start_from.recipe, [*sweep.start_from.overrides, *places])


def _recipe_tree(sweep: Sweep) -> dict[str, Any]:
    return read_tree(sweep.recipe, sweep.overrides)


def _places(sweep: Sweep, data: str, base: str) -> list[str]:
    """Overrides that point a recipe at what the sweep makes."""
    own = [_source(data)] if sweep.corpus is not None else []
    return own + ([f"model.base={_quoted(base)}", "model.architecture=null"] if sweep.start_from is not None else [])


def _source(path: str) -> str:
    """The override that makes a folder the only source."""
    return f"data.sources=[{{path: {_quoted(path)}}}]"


def _quoted(text: str) -> str:
    """Text as YAML reads it back, whatever is in it."""
    return json.dumps(text, ensure_ascii=False)


def _checkpointed(tree: dict[str, Any], keep_all: bool) -> dict[str, Any]:
    """A checkpoint at every validation, so that a trial that is stopped or copied there has one."""
    every = tree.get("validation", {}).get("every_steps", 100)
    kept = {"keep_last": max(2, tree["training"]["steps"] // every)} if keep_all else {}
    return {**tree, "checkpoint": {**tree.get("checkpoint", {}), "every_steps": every, **kept}}


def _unknown_key(key: str) -> list[str]:
    """A key of the space that no recipe has, with the nearest one that it could mean."""
    known = list(all_keys())
    plain = ".".join(part for part in key.split(".") if not part.isdecimal())
    if plain in known:
        return []
    last = key.rpartition(".")[2]
    elsewhere = [one for one in known if one.rpartition(".")[2] == last]
    near = elsewhere or difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    near = near or [
        one
        for name in difflib.get_close_matches(last, [one.rpartition(".")[2] for one in known], n=1)
        for one in known
        if one.endswith(name)
    ]
    return [
        f"space.{key}: no recipe has the key {key}"
        + (f"; did you mean {' or '.join(near[:2])}?" if near else "; `dlm-ray schema recipe` lists them")
    ]


def _check_corners(loaded: Loaded, path: str) -> None:
    sweep = loaded.sweep
    found = spaces.corners(sweep.space, MOST_CORNERS)
    if len(found) > MOST_CORNERS:
        raise UserError(
            f"{path}: the space has more than {MOST_CORNERS} corners, which are all checked; give it fewer keys or values"
        )
    problems: dict[str, str] = {}  # a mistake that many corners make is told of the first
    for settings in found:
        try:
            mistakes = _unmeasurable(sweep, loaded.recipe(settings))
            if sweep.confirm is not None:
                loaded.recipe(settings, overrides=sweep.confirm.overrides)
        except UserError as error:
            mistakes = [str(error).partition(": ")[2]]
        for mistake in mistakes:
            problems.setdefault(mistake, f"at {spaces.label(settings)}: {mistake}")
    if problems:
        raise UserError(listed(path, list(problems.values())))


def _unmeasurable(sweep: Sweep, recipe: Recipe) -> list[str]:
    """What a valid recipe lacks for this sweep."""
    found = []
    is_guided = sweep.scheduler.name != "none" or sweep.search.name == "optuna"
    if recipe.objective.name == "ssd_lm":
        found.append(
            f"objective.name=ssd_lm has no bound, so {sweep.metric} is never reported; remove it from the sweep"
        )
    if recipe.objective.name == "autoregressive" and sweep.metric.endswith("_variance"):
        found.append(
            f"metric={sweep.metric} is never reported of objective.name=autoregressive, which draws nothing; choose another"
        )
    if is_guided and not recipe.validation.sequences:
        found.append(
            f"validation.sequences=0, and the bound that {sweep.scheduler.name}/{sweep.search.name} need is never reported; set it"
        )
    every = sweep.scheduler.every_steps
    if every is not None and (every % recipe.validation.every_steps or every >= recipe.training.steps):
        found.append(
            f"scheduler.every_steps={every}; allowed are multiples of validation.every_steps={recipe.validation.every_steps} below "
            f"training.steps={recipe.training.steps}"
        )
    return found
