"""The state of a run as named tensors, which a commit writes and a resume fills."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dlm_ray.training.ema import Ema


def checkpoint_name(parameter_name: str) -> str:
    """Return a parameter's name in a checkpoint: `model.` and Hugging Face's name; a name `objective.*` stays.

    For example, `denoiser.network.model.norm.weight` becomes `model.model.norm.weight`.
    """
    prefix = "denoiser.network."
    return f"model.{parameter_name[len(prefix) :]}" if parameter_name.startswith(prefix) else parameter_name


def tensors(root: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None) -> dict[str, Tensor]:
    """Return the run's tensors by name: `model.*`, `objective.*`, `optimizer.<name>.exp_avg(_sq)`, `ema.*`."""
    named = {}
    for name, parameter in root.named_parameters():
        stored = checkpoint_name(name)
        named[stored] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            named[f"optimizer.{stored.removeprefix('model.')}.{moment}"] = optimizer.state[parameter][moment]
        if ema is not None:
            named[f"ema.{stored.removeprefix('model.')}"] = ema.averages[name]
    return named
