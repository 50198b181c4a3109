"""The state of a run as named tensors: what is committed, and what a resume fills."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlm_ray.training.ema import Ema


def checkpoint_name(parameter_name: str) -> str:
    """`denoiser.network.model.norm.weight` -> `model.model.norm.weight`: Hugging Face's name behind what it is; `objective.*` stays."""
    own = "denoiser.network."
    return f"model.{parameter_name[len(own) :]}" if parameter_name.startswith(own) else parameter_name


def tensors(root: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None) -> dict[str, Tensor]:
    """Every tensor of the run by its name in a checkpoint: `model.*`, `objective.*`, `optimizer.<name>.exp_avg(_sq)`, `ema.*`."""
    named = {}
    for name, parameter in root.named_parameters():
        stored = checkpoint_name(name)
        named[stored] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            named[f"optimizer.{stored.removeprefix('model.')}.{moment}"] = optimizer.state[parameter][moment]
        if ema is not None:
            named[f"ema.{stored.removeprefix('model.')}"] = ema.averages[name]
    return named
