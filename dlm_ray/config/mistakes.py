"""Messages about invalid configuration trees: pydantic's findings in plain words, with the nearest known key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import get_args, get_origin

from pydantic import BaseModel, ValidationError

Location = Sequence[str | int]
"""Path of a value in a tree: keys, and positions in lists."""


def listed(where: str, problems: Sequence[str]) -> str:
    """Return the mistakes of one file as one message."""
    if len(problems) == 1:
        return f"{where}: {problems[0]}"
    return f"{where}: {len(problems)} mistakes\n" + "\n".join(f"  - {problem}" for problem in problems)


def readable(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    """Yield one message per mistake that pydantic found in a tree of `model`."""
    seen = set()
    findings = error.errors()
    within = {finding["loc"][:length] for finding in findings for length in range(len(finding["loc"]))}
    for finding in findings:
        location = [part for part in finding["loc"] if not _is_branch(part)]
        path = ".".join(str(part) for part in location)
        if path in seen:
            continue  # each branch of a union complains
        if finding["type"] == "too_short" and finding["loc"] in within:
            continue  # because of an invalid item, which has a message of its own
        seen.add(path)
        value, kind = finding.get("input"), finding["type"]
        if kind == "extra_forbidden":
            yield _unknown(location, model)
        elif kind == "missing" or (value is None and kind.endswith("_type")):
            yield f"{path} is missing{_described(location, model)}"
        elif kind == "literal_error":
            yield f"{path}={value!r}; allowed are {finding['ctx']['expected']}"
        elif kind == "value_error":
            message = str(finding["ctx"]["error"])  # of a validator of ours
            yield message if isinstance(value, dict | BaseModel) else f"{path}={_short(value)}: {message}"
        else:
            yield f"{path}={_short(value)}: {finding['msg'][0].lower()}{finding['msg'][1:]}"


def all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every key of a configuration class as a dotted path."""
    for name, field in model.model_fields.items():
        yield prefix + name
        child = _class_in(field.annotation)
        if child is not None and child is not model:
            yield from all_keys(child, f"{prefix}{name}.")


def _is_branch(part: str | int) -> bool:
    """Return whether a part of a pydantic location names a branch of a union rather than a key."""
    if not isinstance(part, str):
        return False
    is_class = part[:1].isupper()  # keys are in lower case
    return is_class or part.startswith(("literal[", "constrained-", "function-")) or part in ("int", "float", "str")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _unknown(location: Location, model: type[BaseModel]) -> str:
    """Return the message for an unknown key: similar keys of the same node, else keys of that name elsewhere."""
    parent = _class_at(location[:-1], model)
    names = list(parent.model_fields) if parent is not None else []
    key, path = str(location[-1]), ".".join(str(part) for part in location)
    near = difflib.get_close_matches(key, names, n=2, cutoff=0.6)
    if near:
        suggestions = [".".join([*map(str, location[:-1]), name]) for name in near]
        return f"{path} is unknown; did you mean {' or '.join(suggestions)}?"
    elsewhere = [known for known in all_keys(model) if known.rpartition(".")[2] == key]
    if elsewhere:
        return f"{path} is unknown; did you mean {' or '.join(elsewhere[:2])}?"
    return f"{path} is unknown; allowed here are {', '.join(names)}"


def _described(location: Location, model: type[BaseModel]) -> str:
    """Return `: <first sentence of the field's description>`, or nothing if it has none."""
    parent = _class_at(location[:-1], model)
    field = parent.model_fields.get(str(location[-1])) if parent is not None else None
    text = " ".join((field.description or "").split()) if field is not None else ""
    first = text.partition(". ")[0].rstrip(".")
    return f": {first[0].lower()}{first[1:]}" if first else ""


def _class_at(location: Location, model: type[BaseModel]) -> type[BaseModel] | None:
    """Return the configuration class at a place in the tree."""
    current: type[BaseModel] | None = model
    for part in location:
        # A number in a list or the key of a mapping stays at the class of the items.
        if current is not None and part in current.model_fields:
            current = _class_in(current.model_fields[str(part)].annotation)
    return current


def _class_in(annotation: object) -> type[BaseModel] | None:
    """Return the configuration class in an annotation such as `Ema | None` or `tuple[Source, ...]`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is None:
        return None
    return next((child for child in map(_class_in, get_args(annotation)) if child is not None), None)
