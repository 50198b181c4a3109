"""`dlm-ray schema` and `dlm-ray doctor`: the keys of configuration files, and the state of this machine."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from dlm_ray.cli.arguments import Json
from dlm_ray.cli.console import print_mapping, show_result
from dlm_ray.config.errors import UserError


def schema(
    kind: Annotated[str, typer.Argument(help="recipe, sweep or server.", metavar="[KIND]")] = "recipe",
) -> None:
    """Print the JSON Schema of recipes, sweeps or services: every key with its type, default and meaning."""
    from pydantic import BaseModel

    from dlm_ray.config.recipe import Recipe
    from dlm_ray.config.server import Server
    from dlm_ray.config.sweep import Sweep

    kinds: dict[str, type[BaseModel]] = {"recipe": Recipe, "sweep": Sweep, "server": Server}
    if kind not in kinds:
        raise UserError(f"there is no schema {kind!r}; allowed is {', '.join(kinds)}")
    sys.stdout.write(json.dumps(kinds[kind].model_json_schema(), indent=2) + "\n")


def doctor(as_json: Json = False) -> None:
    """Show versions, cores, memory, GPUs and free disk of this machine, and which optional packages are missing."""
    import importlib.metadata
    import os
    import platform
    import shutil

    import torch

    facts: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    for package in ("torch", "ray", "transformers", "tensorstore", "gguf", "flash-attn"):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["cuda"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or "no device"
    facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    facts["free_disk_gib"] = round(shutil.disk_usage(".").free / 2**30, 1)
    show_result(facts, as_json, lambda: print_mapping("this machine", facts))
