"""Configuration trees before validation: YAML, `key=value` overrides, differences, and absolute paths."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from dlm_ray.config.errors import UserError

Tree = dict[str, Any]
"""Plain values of a configuration file: mappings, lists, strings, numbers, booleans and null."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number and refuses a repeated key."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, object]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is repeated", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, where: str, kind: str) -> Tree:
    """Return the tree of a YAML file.

    Args:
        text: content of the file.
        where: its name, for messages.
        kind: what the file is, for messages (`recipe`, `sweep`, `server`).

    Raises:
        UserError: if the text is not YAML or not a mapping.
    """
    try:
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{where}: a {kind} is a mapping of keys to values, not a {type(tree).__name__}")
    return tree


def set_key(tree: Tree, override: str) -> list[str]:
    """Apply one `a.b.c=value` override to the tree in place and return what is wrong with it.

    Values are YAML; `null` removes the key; list items are counted from 0, and the number after the last one appends.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        return [f"{override!r} is not of the form key=value, such as training.steps=100"]
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        return [f"{override!r}: the value is not YAML ({getattr(error, 'problem', error)})"]
    node: object = tree
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


def differences(before: object, after: object, key: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (dotted key, value before, value after) wherever two trees differ; values are JSON, `null` if absent."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*before, *after]):
            yield from differences(before.get(name), after.get(name), f"{key}.{name}" if key else str(name))
    elif before != after:
        yield key, json.dumps(before), json.dumps(after)


def with_absolute_paths(tree: Tree) -> Tree:
    """Return a recipe's tree with absolute paths of data and base, for processes in other working directories.

    URLs stay as they are, and so does a base that is not a local path (a hub name).
    """
    data, model = dict(tree.get("data") or {}), dict(tree.get("model") or {})
    if data.get("sources"):
        data["sources"] = [{**source, "path": _absolute(source["path"])} for source in data["sources"]]
    if model.get("base") and Path(model["base"]).exists():
        model["base"] = _absolute(model["base"])
    return {**tree, **({"data": data} if data else {}), **({"model": model} if model else {})}


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).absolute())
