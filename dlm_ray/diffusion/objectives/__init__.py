"""One paper a file; `find` gives the class that a recipe's `objective.name` means."""

from __future__ import annotations

import importlib
from typing import Any

from dlm_ray.diffusion.objectives.autoregressive import Autoregressive
from dlm_ray.diffusion.objectives.block import Block
from dlm_ray.diffusion.objectives.d3pm import D3pm
from dlm_ray.diffusion.objectives.genmd4 import GenMD4
from dlm_ray.diffusion.objectives.masked import Masked
from dlm_ray.diffusion.objectives.sedd import Sedd
from dlm_ray.diffusion.objectives.ssd_lm import SsdLm
from dlm_ray.diffusion.objectives.tauldr import TauLDR

BY_NAME: dict[str, Any] = {
    "autoregressive": Autoregressive,
    "masked": Masked,
    "block": Block,
    "genmd4": GenMD4,
    "sedd": Sedd,
    "d3pm": D3pm,
    "tauldr": TauLDR,
    "ssd_lm": SsdLm,
}


def find(name: str) -> Any:
    """The class of the objective `name`: one of BY_NAME, or `package.module:Class`, which is called as `Masked` is.

    Raises:
        ValueError: for a name that is neither.
    """
    if name in BY_NAME:
        return BY_NAME[name]
    module_name, colon, class_name = name.partition(":")
    if not colon:
        raise ValueError(
            f"objective.name={name!r}; allowed are {', '.join(BY_NAME)}, or package.module:Class for one of your own"
        )
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"objective.name={name!r} cannot be imported: {error}") from error
