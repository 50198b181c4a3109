"""The frozen autoregressive base that `objective.alignment_weight` aligns with, sharded like the trained network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dlm_ray.config.errors import UserError
from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.recipe import Recipe
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.models import families, parallel
from dlm_ray.models.denoiser import HuggingFaceDenoiser
from dlm_ray.training import setup


class Teacher(nn.Module):
    """A separate FSDP root: its parameters are in no checkpoint, EMA or optimizer of the run."""

    def __init__(self, denoiser: HuggingFaceDenoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, input_ids: Tensor, visibility: Visibility) -> tuple[Tensor, ...]:
        """Map ids [B, L] to the embeddings and the hidden states [B, L, D] after every layer."""
        return self.denoiser.states(input_ids, visibility)


def describe(recipe: Recipe) -> JsonObject:
    """Return the configuration of the base.

    Raises:
        UserError: if the base is not autoregressive.
    """
    base = recipe.model.base or ""
    fields, mask_id, _ = setup.describe_base(base)
    if mask_id is not None:
        raise UserError(
            f"objective.alignment_weight aligns with an autoregressive model, and model.base={base} is a diffusion "
            "model; set it to 0"
        )
    return fields


def load(recipe: Recipe, mesh: DeviceMesh, device: torch.device) -> Teacher:
    """Load the base with its weights from before the run."""
    denoiser = parallel.build(
        families.read_config(describe(recipe)), None, recipe.objective.shift, recipe.model.attention
    )
    denoiser.requires_grad_(False)
    teacher = Teacher(denoiser)
    parallel.shard(teacher, denoiser, mesh, recipe.training.precision, replicated=set())
    parallel.materialize(denoiser, device)
    setup.load_base_weights(recipe.model.base or "", denoiser, extra_rows=set(), seed=recipe.seed)
    return teacher.eval()
