"""Import of custom classes, which a recipe names as `package.module:Class`; this file itself does not import torch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from dlm_ray.config.errors import UserError


def is_class_path(name: str) -> bool:
    """Return whether `name` has the form `package.module:Class` rather than being a built-in name."""
    return ":" in name


def import_class(path: str, kind: str, *, allowed: Sequence[str] = (), requires: Sequence[str] = ()) -> type[Any]:
    """Return the class that `path` names.

    Args:
        path: `package.module:Class`.
        kind: the configuration key that holds the path, such as `objective.name`; every message begins with it.
        allowed: built-in names of the key, which the message lists if `path` has another form.
        requires: attributes that the class must have.

    Raises:
        UserError: if `path` has another form, the module cannot be imported, it has no such class, or the class lacks a
            required attribute.
    """
    module_name, _, class_name = path.partition(":")
    if not module_name or not class_name:
        names = f"{', '.join(allowed)}, or " if allowed else ""
        raise UserError(f"{kind}={path}; allowed are {names}package.module:Class for a custom class")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"{kind}={path}: module {module_name} cannot be imported ({error}); install its package, or add its folder "
            "to PYTHONPATH"
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise UserError(f"{kind}={path}: module {module_name} has no class {class_name}; change {kind}")
    missing = [name for name in requires if not hasattr(found, name)]
    if missing:
        raise UserError(f"{kind}={path}: class {class_name} lacks {', '.join(missing)}; add what is missing to it")
    return found
