"""Sweeps from YAML and `key=value`: the sweep, its recipe and all corners of its space are checked first."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from dlm_ray.config import space as spaces
from dlm_ray.config.errors import UserError
from dlm_ray.config.load import load_recipe, read_tree, validate
from dlm_ray.config.mistakes import all_keys, listed, readable
from dlm_ray.config.recipe import Recipe
from dlm_ray.config.space import Settings
from dlm_ray.config.sweep import Sweep
from dlm_ray.config.trees import Tree, set_key

MAX_CORNERS = 5000
# Placeholders in the recipe until the sweep has built its own data and trained its own base.
_DATA, _BASE = "the-data-of-the-sweep", "the-base-of-the-sweep"


@dataclass(frozen=True)
class Loaded:
    """A sweep that has been checked, with its recipe."""

    sweep: Sweep
    tree: Tree
    """The recipe before any setting is applied."""

    def recipe(
        self, settings: Settings, data: str | None = None, base: str | None = None, overrides: Sequence[str] = ()
    ) -> Recipe:
        """Return the recipe of a trial.

        Args:
            settings: values of the trial.
            data: folder of the sweep's own data, once it is built.
            base: run directory of the sweep's own base, once it is trained.
            overrides: further overrides, of a confirming run.

        Raises:
            UserError: if the result is not a valid recipe.
        """
        tree, problems = spaces.apply(self.tree, settings)
        extra = [*_places(self.sweep, data or _DATA, base or _BASE), *overrides]
        problems += [problem for override in extra for problem in set_key(tree, override)]
        where = f"{self.sweep.name} with {spaces.label(settings)}"
        if problems:
            raise UserError(listed(where, problems))
        validate(tree, where)  # before its keys are read
        if self.sweep.scheduler.name != "none":
            tree = _checkpointed(tree, keep_all=self.sweep.scheduler.name == "pbt")
        tree = {**tree, "tracking": {"group": self.sweep.name, **tree.get("tracking", {})}}
        return validate(tree, where)


def load_sweep(path: str, overrides: Sequence[str] = ()) -> Loaded:
    """Load a sweep from a YAML file or by its shipped name.

    Args:
        path: file or shipped name.
        overrides: `key=value`; keys of the sweep change the sweep, all others its recipe.

    Raises:
        UserError: with every mistake that was found.
    """
    for_sweep = [one for one in overrides if one.partition("=")[0].partition(".")[0] in Sweep.model_fields]
    for_recipe = [one for one in overrides if one not in for_sweep]
    tree = read_tree(path, for_sweep, kind="sweep")
    if for_recipe:
        tree["overrides"] = [*tree.get("overrides", ()), *for_recipe]
    try:
        sweep = Sweep.model_validate(tree)
    except ValidationError as error:
        raise UserError(listed(path, list(readable(error, Sweep)))) from error
    problems = sweep.contradictions() + [problem for key in sweep.space for problem in _unknown_key(key)]
    if problems:
        raise UserError(listed(path, problems))
    loaded = Loaded(sweep, read_tree(sweep.recipe, sweep.overrides))
    _check_corners(loaded, path)
    if sweep.start_from is not None:
        start_recipe(sweep, _DATA)
    return loaded


def start_recipe(sweep: Sweep, data: str | None) -> Recipe:
    """Return the recipe of the run that all trials start from; `data` is the sweep's own data, if it builds some."""
    assert sweep.start_from is not None, "the sweep trains its own base"
    places = [_source(data)] if sweep.corpus is not None and data is not None else []
    return load_recipe(sweep.start_from.recipe, [*sweep.start_from.overrides, *places])


def _places(sweep: Sweep, data: str, base: str) -> list[str]:
    """Return the overrides that point a recipe to the data and the base that the sweep makes."""
    overrides = [_source(data)] if sweep.corpus is not None else []
    if sweep.start_from is not None:
        overrides += [f"model.base={_quoted(base)}", "model.architecture=null"]
    return overrides


def _source(path: str) -> str:
    """Return the override that makes a folder the only source."""
    return f"data.sources=[{{path: {_quoted(path)}}}]"


def _quoted(text: str) -> str:
    """Return text as a YAML string, whatever characters it has."""
    return json.dumps(text, ensure_ascii=False)


def _checkpointed(tree: Tree, keep_all: bool) -> Tree:
    """Set a checkpoint at every validation, where a scheduler may stop or copy the trial."""
    every = tree.get("validation", {}).get("every_steps", 100)
    kept = {"keep_last": max(2, tree["training"]["steps"] // every)} if keep_all else {}
    return {**tree, "checkpoint": {**tree.get("checkpoint", {}), "every_steps": every, **kept}}


def _unknown_key(key: str) -> list[str]:
    """Return the message for a key of the space that recipes do not have, with the nearest one."""
    known = list(all_keys(Recipe))
    plain = ".".join(part for part in key.split(".") if not part.isdecimal())
    if plain in known:
        return []
    last = key.rpartition(".")[2]
    near = [one for one in known if one.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    near = near or [
        one
        for name in difflib.get_close_matches(last, [one.rpartition(".")[2] for one in known], n=1)
        for one in known
        if one.endswith(name)
    ]
    hint = f"did you mean {' or '.join(near[:2])}?" if near else "`dlm-ray schema recipe` lists all keys"
    return [f"space.{key}: recipes have no key {key}; {hint}"]


def _check_corners(loaded: Loaded, path: str) -> None:
    """Check the recipe at every corner of the space; a mistake that many corners share is reported once."""
    sweep = loaded.sweep
    corners = spaces.corners(sweep.space, MAX_CORNERS)
    if len(corners) > MAX_CORNERS:
        raise UserError(
            f"{path}: the space has more than {MAX_CORNERS} corners, which are all checked; give it fewer keys or "
            "values"
        )
    problems: dict[str, str] = {}
    for settings in corners:
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
    """Return what a valid recipe lacks for this sweep's metric, search or scheduler."""
    problems = []
    if recipe.objective.name == "ssd_lm":
        problems.append(
            f"objective.name=ssd_lm has no bound, so {sweep.metric} is never reported; remove it from the sweep"
        )
    if recipe.objective.name == "autoregressive" and sweep.metric.endswith("_variance"):
        problems.append(
            f"metric={sweep.metric} is never reported for objective.name=autoregressive, which has no draws; choose "
            "another metric"
        )
    needs_bound = sweep.scheduler.name != "none" or sweep.search.name == "optuna"
    if needs_bound and not recipe.validation.sequences:
        problems.append(
            f"validation.sequences=0, so the bound that {sweep.scheduler.name}/{sweep.search.name} need is never "
            "reported; set validation.sequences"
        )
    every = sweep.scheduler.every_steps
    if every is not None and (every % recipe.validation.every_steps or every >= recipe.training.steps):
        problems.append(
            f"scheduler.every_steps={every}; allowed are multiples of "
            f"validation.every_steps={recipe.validation.every_steps} below training.steps={recipe.training.steps}"
        )
    return problems
