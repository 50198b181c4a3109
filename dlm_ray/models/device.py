"""The device that a network is placed on."""

from __future__ import annotations

import torch

from dlm_ray.config.errors import UserError


def pick_device(name: str, key: str = "device") -> torch.device:
    """Return the device type that `name` selects on this machine, without an index.

    Args:
        name: `cpu`, `cuda`, or `auto`: CUDA if this machine has it.
        key: the setting to name in the error.

    Raises:
        UserError: if CUDA is requested and absent.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{key}=cuda, and this machine shows no CUDA device; set {key}=cpu or auto")
    return torch.device("cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda")
