"""One paper a file; `build` finds an objective by the name that a recipe gives."""

from __future__ import annotations

import importlib
from typing import Any

from dlm_ray.diffusion.objectives.autoregressive import Autoregressive
from dlm_ray.diffusion.objectives.masked import Masked
from dlm_ray.diffusion.schedules import Schedule

NAMES = ("masked", "autoregressive")


def build(name: str, schedule: Schedule, normalize_by: str) -> Any:
    """The objective `name`: one of NAMES, or `package.module:Class`, which is called with (schedule, normalize_by).

    Raises:
        ValueError: for a name that is neither.
    """
    if name == "masked":
        return Masked(schedule, normalize_by)
    if name == "autoregressive":
        return Autoregressive()
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise ValueError(f"objective.name={name!r}; allowed are {', '.join(NAMES)}, or package.module:Class for one of your own")
    try:
        objective = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"objective.name={name!r} cannot be imported: {error}") from error
    return objective(schedule, normalize_by)
