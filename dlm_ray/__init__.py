"""dlm_ray turns an autoregressive language model into a diffusion language model, on a laptop or on a Ray cluster.

`load(path)` returns a model that samples, infills and scores text; `recipe(path, overrides)` loads a recipe, and
`fit(recipe)` runs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "fit", "load", "recipe"]

# Imported at first use, because `dlm-ray --help` needs neither torch nor Ray.
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
