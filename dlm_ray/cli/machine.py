"""`dlm-ray schema` and `dlm-ray doctor`: what a configuration file may contain, and what this machine has."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from dlm_ray.cli.arguments import Json
from dlm_ray.cli.console import print_mapping, show_result
from dlm_ray.config.errors import UserError


def schema(kind: Annotated[str, typer.Argument(help="recipe, sweep or server")] = "recipe") -> None:
    """The JSON Schema of a recipe, a sweep or a server, for editors."""
    from dlm_ray.config.recipe import Recipe
    from dlm_ray.config.server import Server
    from dlm_ray.config.sweep import Sweep

    kinds: dict[str, Any] = {"recipe": Recipe, "sweep": Sweep, "server": Server}
    if kind not in kinds:
        raise UserError(f"there is no schema {kind!r}; allowed is {', '.join(kinds)}")
    sys.stdout.write(json.dumps(kinds[kind].model_json_schema(), indent=2) + "\n")


def doctor(as_json: Json = False) -> None:
    """Versions, cores, memory, GPUs and disk of this machine, and what is missing."""
    import importlib.metadata
    import os
    import platform
    import shutil

    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    for package in ("torch", "ray", "transformers", "tensorstore", "gguf", "flash-attn"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["cuda"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or "no device"
    found["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    found["free_disk_gib"] = round(shutil.disk_usage(".").free / 2**30, 1)
    show_result(found, as_json, lambda: print_mapping("this machine", found))
