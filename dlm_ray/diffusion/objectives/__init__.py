"""The objectives, one paper per file; `build` and `restore` create the objective of a recipe's `objective` section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from dlm_ray.diffusion.denoiser import NetworkFacts, Objective
from dlm_ray.diffusion.objectives.autoregressive import Autoregressive
from dlm_ray.diffusion.objectives.block import Block
from dlm_ray.diffusion.objectives.d3pm import D3pm
from dlm_ray.diffusion.objectives.genmd4 import GenMD4
from dlm_ray.diffusion.objectives.masked import Masked
from dlm_ray.diffusion.objectives.sedd import Sedd
from dlm_ray.diffusion.objectives.ssd_lm import SsdLm
from dlm_ray.diffusion.objectives.tauldr import TauLDR
from dlm_ray.diffusion.settings import ObjectiveSettings

__all__ = [
    "CLASSES",
    "Autoregressive",
    "Block",
    "D3pm",
    "GenMD4",
    "Masked",
    "Sedd",
    "SsdLm",
    "TauLDR",
    "build",
    "class_of",
    "restore",
]

CLASSES: dict[str, type[Objective]] = {
    "autoregressive": Autoregressive,
    "masked": Masked,
    "block": Block,
    "genmd4": GenMD4,
    "sedd": Sedd,
    "d3pm": D3pm,
    "tauldr": TauLDR,
    "ssd_lm": SsdLm,
}


def class_of(settings: Mapping[str, object]) -> type[Objective]:
    """Return the class of an `objective` section, whose `name` is a key of CLASSES or a custom class itself."""
    name = cast(ObjectiveSettings, settings)["name"]
    return CLASSES[name] if isinstance(name, str) else name


def build(settings: Mapping[str, object], facts: NetworkFacts) -> Objective:
    """Return the objective that trains a network by an `objective` section.

    Raises:
        ValueError: if the settings do not fit the network.
    """
    return class_of(settings).build(cast(ObjectiveSettings, settings), facts)


def restore(settings: Mapping[str, object], facts: NetworkFacts) -> Objective:
    """Return the objective that scores and samples a network that was trained by an `objective` section."""
    return class_of(settings).restore(cast(ObjectiveSettings, settings), facts)
