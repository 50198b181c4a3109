"""Recipes from YAML and `key=value`: every mistake at once, each with what is allowed and the key to change."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from dlm_ray.config.errors import UserError
from dlm_ray.config.paths import local_path
from dlm_ray.config.recipe import Recipe

# Where a run may be placed, how it is watched and what it does when something fails do not change what comes out of it.
NOT_IN_RESULT: dict[str, Any] = {
    "parallelism": True,
    "tracking": True,
    "checkpoint": True,
    "sampling": True,
    "data": {"on_bad_sample"},
    "training": {"max_skipped_steps"},
}


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, with `a.b.c=value` overrides on top.

    Args:
        path: a file, or the name of a shipped one (`quickstart`).
        overrides: values are YAML; `data.sources.0.path=x` counts lists from 0; `null` takes a key away.

    Raises:
        UserError: with every mistake that was found.
    """
    return validate(read_tree(path, overrides), path)


def read_tree(path: str, overrides: Sequence[str] = (), *, kind: str = "recipe") -> dict[str, Any]:
    """The plain values of a recipe or a sweep, with overrides on top, before anything is checked.

    Raises:
        UserError: if there is no such file, it is no YAML, or an override is malformed.
    """
    tree = _parse(_text(path, kind), path, kind)
    problems: list[str] = []
    for override in overrides:
        problems += set_key(tree, override)
    if problems:
        raise UserError(listed(path, problems))
    return tree


def validate(tree: dict[str, Any], where: str) -> Recipe:
    """The recipe that a tree of plain values means.

    Raises:
        UserError: with every mistake that was found.
    """
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(listed(where, list(readable(error)))) from error
    found = recipe.contradictions()
    if found:
        raise UserError(listed(where, found))
    return recipe


def dump(recipe: Recipe) -> str:
    """YAML of everything that is not the default; `load_recipe` reads it back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def recipe_hash(recipe: Recipe) -> str:
    """8 hexadecimal digits of everything that changes the result: not the workers, the tracking, the checkpoints."""
    content = recipe.model_dump(mode="json", exclude=NOT_IN_RESULT)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def run_name(recipe: Recipe) -> str:
    """The name of the recipe's run directory."""
    return f"{recipe.name}-{recipe_hash(recipe)}"


def shipped() -> dict[str, Any]:
    """The recipes that come with the package, by name without .yaml: `quickstart`, `recipes/md4_text8`."""
    return _shipped(("", "recipes/"))


def shipped_sweeps() -> dict[str, Any]:
    """The sweeps that come with the package: `sweeps/block_size`, `sweeps/laptop/block_size`."""
    return _shipped(("sweeps/", "sweeps/laptop/"))


def _shipped(prefixes: Sequence[str]) -> dict[str, Any]:
    folder = resources.files("dlm_ray.configs")
    found = {
        f"{prefix}{file.name}": file
        for prefix in prefixes
        for file in (folder / prefix if prefix else folder).iterdir()
    }
    return {name.removesuffix(".yaml"): file for name, file in found.items() if name.endswith(".yaml")}


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number and a key stands once."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _text(path: str, kind: str) -> str:
    file = local_path(path, f"the {kind}", "a local file, or the name of a shipped one")
    if file.is_file():
        return file.read_text()
    known = shipped() if kind == "recipe" else shipped_sweeps()
    name = path.removesuffix(".yaml")
    if name in known:
        text: str = known[name].read_text()
        return text
    near = difflib.get_close_matches(Path(name).name, known, n=3, cutoff=0.4) or sorted(known)
    raise UserError(f"there is no {kind} {path!r}: neither a file nor one of the shipped ones; near: {', '.join(near)}")


def _parse(text: str, where: str, kind: str) -> dict[str, Any]:
    try:
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{where}: a {kind} is a mapping of keys to values, and this is {type(tree).__name__}")
    return tree


def set_key(tree: dict[str, Any], override: str) -> list[str]:
    """Puts one `a.b.c=value` into the tree; returns what is wrong with it."""
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        return [f"{override!r} is not of the form key=value, such as training.steps=100"]
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        return [f"{override!r}: the value is not YAML ({getattr(error, 'problem', error)})"]
    node: Any = tree
    for key in keys[:-1]:
        if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, dict):
            node = node.setdefault(key, {})
            if node is None:
                return [f"{override!r}: {key} is null, and nothing can be set below it"]
        else:
            return [f"{override!r}: there is no {key!r} to set something in"]
    last = keys[-1]
    if isinstance(node, list) and last.isdecimal() and int(last) <= len(node):
        node[int(last) : int(last) + 1] = [] if value is None else [value]
    elif isinstance(node, dict):
        if value is None:
            node.pop(last, None)
        else:
            node[last] = value
    else:
        return [f"{override!r}: there is no {last!r} to set"]
    return []


def listed(where: str, problems: list[str]) -> str:
    """The mistakes of one file as one message."""
    if len(problems) == 1:
        return f"{where}: {problems[0]}"
    return f"{where}: {len(problems)} mistakes\n" + "\n".join(f"  - {problem}" for problem in problems)


def readable(error: ValidationError, model: type[BaseModel] = Recipe) -> Iterator[str]:
    """Pydantic's findings of a tree of `model` in plain words, one a mistake."""
    seen = set()
    for finding in error.errors():
        location = [part for part in finding["loc"] if not _is_branch(part)]
        path = ".".join(str(part) for part in location)
        if path in seen:
            continue  # the branches of a union each complain
        seen.add(path)
        value = finding.get("input")
        kind = finding["type"]
        if kind == "extra_forbidden":
            yield _unknown(location, model)
        elif kind == "missing":
            yield f"{path} is missing"
        elif kind == "literal_error":
            yield f"{path}={value!r}; allowed are {finding['ctx']['expected']}"
        else:
            yield f"{path}={_short(value)}: {finding['msg'][0].lower()}{finding['msg'][1:]}"


def _is_branch(part: Any) -> bool:
    """Whether a part of a location names a branch of a union rather than a key."""
    if not isinstance(part, str):
        return False
    is_class = part[:1].isupper()  # keys are in small letters
    return is_class or part.startswith(("literal[", "constrained-", "function-")) or part in ("int", "float", "str")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _unknown(location: list[Any], model: type[BaseModel]) -> str:
    """An unknown key: the nearest names at its place, else where in the tree a key of that name is."""
    fields = _fields_at(location[:-1], model)
    key, path = str(location[-1]), ".".join(str(part) for part in location)
    near = difflib.get_close_matches(key, fields, n=2, cutoff=0.6)
    if near:
        return f"{path} is unknown; did you mean {' or '.join('.'.join([*map(str, location[:-1]), name]) for name in near)}?"
    elsewhere = [known for known in all_keys(model) if known.rpartition(".")[2] == key]
    if elsewhere:
        return f"{path} is unknown; did you mean {' or '.join(elsewhere[:2])}?"
    return f"{path} is unknown; allowed here are {', '.join(fields)}"


def _fields_at(location: Sequence[Any], model: Any) -> list[str]:
    for part in location:
        if part in model.model_fields:  # not the number in a list, or the key of a mapping
            model = _part_of(model.model_fields[part].annotation)
    return list(model.model_fields)


def _part_of(annotation: Any) -> Any:
    """The configuration class in an annotation such as `Ema | None` or `tuple[Source, ...]`; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is None:
        return None
    return next((found for found in map(_part_of, get_args(annotation)) if found is not None), None)


def all_keys(model: Any = Recipe, prefix: str = "") -> Iterator[str]:
    """Every key that a recipe may have, as a dotted path."""
    for name, field in model.model_fields.items():
        yield prefix + name
        part = _part_of(field.annotation)
        if part is not None and part is not model:
            yield from all_keys(part, f"{prefix}{name}.")
