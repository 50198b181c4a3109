"""Recipes from YAML and `key=value` overrides: every mistake at once, with what is allowed and the key to change."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import yaml
from pydantic import ValidationError

from dlm_ray.config.errors import UserError
from dlm_ray.config.mistakes import listed, readable
from dlm_ray.config.paths import local_path
from dlm_ray.config.recipe import Recipe
from dlm_ray.config.trees import Tree, parse_yaml, set_key

# Keys that do not change the result of a run: where it runs, how it is tracked, and what it does when something fails.
NOT_IN_RESULT: dict[str, bool | set[str]] = {
    "parallelism": True,
    "tracking": True,
    "checkpoint": True,
    "sampling": True,
    "data": {"on_bad_sample"},
    "training": {"max_skipped_steps"},
}


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe from a YAML file and apply `a.b.c=value` overrides.

    Args:
        path: a file, or the name of a shipped recipe (`quickstart`).
        overrides: values are YAML; `data.sources.0.path=x` counts list items from 0; `null` removes a key.

    Raises:
        UserError: with every mistake that was found.
    """
    return validate(read_tree(path, overrides), path)


def read_tree(path: str, overrides: Sequence[str] = (), *, kind: str = "recipe") -> Tree:
    """Return the plain values of a recipe or a sweep with overrides applied, before validation.

    Raises:
        UserError: if there is no such file, it is not YAML, or an override is malformed.
    """
    tree = parse_yaml(_text(path, kind), path, kind)
    problems = [problem for override in overrides for problem in set_key(tree, override)]
    if problems:
        raise UserError(listed(path, problems))
    return tree


def validate(tree: Tree, where: str) -> Recipe:
    """Return the recipe of a tree of plain values.

    Args:
        tree: plain values.
        where: name of the file, for messages.

    Raises:
        UserError: with every mistake that was found.
    """
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(listed(where, list(readable(error, Recipe)))) from error
    problems = recipe.contradictions()
    if problems:
        raise UserError(listed(where, problems))
    return recipe


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML without default values; `load_recipe` reads it back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def recipe_hash(recipe: Recipe) -> str:
    """Return 8 hexadecimal digits of the keys that change the result (not workers, tracking or checkpoints)."""
    content = recipe.model_dump(mode="json", exclude=NOT_IN_RESULT)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def run_name(recipe: Recipe) -> str:
    """Return the name of the recipe's run directory, `<name>-<hash>`."""
    return f"{recipe.name}-{recipe_hash(recipe)}"


def shipped() -> dict[str, Traversable]:
    """Return the recipes in the package, by name without .yaml: `quickstart`, `recipes/md4_text8`."""
    return _shipped(("", "recipes/"))


def shipped_sweeps() -> dict[str, Traversable]:
    """Return the sweeps in the package: `sweeps/block_size`, `sweeps/laptop/block_size`."""
    return _shipped(("sweeps/", "sweeps/laptop/"))


def _shipped(prefixes: Sequence[str]) -> dict[str, Traversable]:
    root = resources.files("dlm_ray.configs")
    files = {f"{prefix}{file.name}": file for prefix in prefixes for file in root.joinpath(prefix).iterdir()}
    return {name.removesuffix(".yaml"): file for name, file in files.items() if name.endswith(".yaml")}


def _text(path: str, kind: str) -> str:
    file = local_path(path, f"the {kind}", "a local file, or the name of a shipped one")
    if file.is_file():
        return file.read_text()
    known = shipped() if kind == "recipe" else shipped_sweeps()
    name = path.removesuffix(".yaml")
    if name in known:
        return known[name].read_text()
    near = difflib.get_close_matches(Path(name).name, known, n=3, cutoff=0.4) or sorted(known)
    raise UserError(f"there is no {kind} {path!r}: neither a file nor a shipped one; near: {', '.join(near)}")
