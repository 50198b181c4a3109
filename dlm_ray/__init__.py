"""dlm_ray: an autoregressive language model becomes a diffusion language model, on one laptop or on a Ray cluster.

`load(path)` gives a checkpoint that samples, infills and scores text; `fit(recipe)` runs a recipe; `recipe(path, *overrides)` reads one.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "fit", "load", "recipe"]

# Imported when they are asked for: `dlm-ray --help` needs neither torch nor Ray.
_PUBLIC = {
    "load": ("dlm_ray.generation.loading", "load"),
    "fit": ("dlm_ray.runtime.train", "fit"),
    "recipe": ("dlm_ray.config.load", "load_recipe"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)
