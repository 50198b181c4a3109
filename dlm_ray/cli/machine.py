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


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Instead: check whether this model's family can be adapted. A Hugging Face folder, a hub name, or a "
            "model type such as olmo2.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show versions, cores, memory, GPUs and free disk of this machine, and which optional packages are missing.

    With MODEL, run the checks that its family must pass to become a denoiser, on a tiny random network of the family.
    """
    if model is not None:
        _check_family(model, as_json)
        return
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


def _check_family(model: str, as_json: bool) -> None:
    """Print the result of every gate for the family of a model, and exit with 1 if one is not passed."""
    from dlm_ray.checkpoint.pretrained import open_pretrained
    from dlm_ray.config.recipe import FAMILIES
    from dlm_ray.models.gates import check_family, config_of, is_model_type

    config = config_of(model if is_model_type(model) else open_pretrained(model).config())
    results = check_family(config)
    facts: dict[str, Any] = {gate.name: gate.failure or "good" for gate in results}
    is_passed = all(not gate.failure for gate in results)
    refused = f"no; choose a model of {', '.join(FAMILIES)}, or another family that passes"
    facts["can be adapted"] = "yes" if is_passed else refused
    show_result(facts, as_json, lambda: print_mapping(f"family {config.model_type}", facts))
    if not is_passed:
        raise typer.Exit(1)
