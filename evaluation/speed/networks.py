"""The networks that are timed: their shapes, recipes, and random weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dlm_ray.config.load import validate
from dlm_ray.config.recipe import Architecture, Recipe
from dlm_ray.diffusion.denoiser import Objective
from dlm_ray.models import families, parallel
from dlm_ray.models.denoiser import HuggingFaceDenoiser
from dlm_ray.training import setup
from dlm_ray.training.step import TrainModule

# BD3-LM's blocks of 16 tokens, with the clip that its Table 2 recommends and the counts that its code enforces.
BLOCK_TOKENS, CLIP_BETA, CLIP_OMEGA = 16, 0.3, 0.8
CONTEXT = 1024


@dataclass(frozen=True)
class Shape:
    """The size of a network and of its training batch."""

    width: int
    num_layers: int
    num_heads: int
    sequence_length: int
    vocab_size: int
    """V, without the mask token."""
    batch_size: int
    """Sequences per training step."""
    tie_embeddings: bool

    @property
    def architecture(self) -> Architecture:
        """The `model.architecture` of a recipe for this shape."""
        return Architecture(
            width=self.width,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            max_positions=self.sequence_length,
            tie_embeddings=self.tie_embeddings,
        )


SHAPES = {
    "quickstart": Shape(
        width=256, num_layers=4, num_heads=4, sequence_length=256, vocab_size=4096, batch_size=16, tie_embeddings=True
    ),
    "medium": Shape(
        width=512, num_layers=8, num_heads=8, sequence_length=256, vocab_size=16_384, batch_size=8, tie_embeddings=True
    ),
    # BD3-LM's small network on LM1B (arXiv 2503.09573, appendix C), with a gated feed-forward layer of the same size.
    "bd3-small": Shape(
        width=768,
        num_layers=12,
        num_heads=12,
        sequence_length=128,
        vocab_size=30_522,
        batch_size=8,
        tie_embeddings=False,
    ),
}


def training_recipe(shape: Shape, objective: str) -> Recipe:
    """Return a recipe that trains a network of this shape from scratch; bfloat16 on CUDA, float32 on the CPU."""
    clip = {"beta": CLIP_BETA, "omega": CLIP_OMEGA, "weight": "paper", "enforce": "counts"}
    block = {"block_tokens": BLOCK_TOKENS, "clip": clip, "shift": False} if objective == "block" else {}
    name = f"speed-{objective}"
    tree = {
        "name": name,
        "model": {"architecture": shape.architecture.model_dump()},
        "data": {"sources": [{"path": "none"}]},
        "objective": {"name": objective, **block},
        "training": {
            "steps": 1,
            "global_batch_size": shape.batch_size,
            "micro_batch_size": shape.batch_size,
            "precision": "bf16" if torch.cuda.is_available() else "fp32",
        },
    }
    return validate(tree, name)


def network_of(recipe: Recipe, vocab_size: int) -> setup.Network:
    """Return the network of a recipe from scratch for `vocab_size` tokens, plus a mask token unless it is causal."""
    assert recipe.model.architecture is not None, "the recipe trains from scratch"
    is_causal = setup.is_causal(recipe)
    mask_id = None if is_causal else vocab_size
    config = families.scratch_config(recipe.model.architecture, vocab_size + (mask_id is not None), 0, 0)
    return setup.Network(config.to_dict(), mask_id, recipe.objective.shift, is_causal)


def build_root(recipe: Recipe, network: setup.Network, objective: Objective, device: torch.device) -> TrainModule:
    """Build the FSDP2 module that a training run trains, with initial weights; needs a process group."""
    root, denoiser = setup.build(recipe, network, objective, init_device_mesh(device.type, (1,)), device)
    setup.init_weights(recipe, network, denoiser, objective)
    return root


def random_denoiser(architecture: Architecture, vocab_size: int, device: torch.device) -> HuggingFaceDenoiser:
    """Return a block-diffusion network with random weights and a context of CONTEXT positions.

    Args:
        architecture: its `max_positions` is replaced by CONTEXT.
        vocab_size: V, without the mask token.
        device: where the weights lie.
    """
    architecture = architecture.model_copy(update={"max_positions": CONTEXT})
    denoiser = parallel.build(families.scratch_config(architecture, vocab_size + 1, 0, 0), vocab_size, shift=False)
    parallel.materialize(denoiser, device)
    parallel.initialize(denoiser, seed=0)
    return denoiser


@contextlib.contextmanager
def single_process_group(device: torch.device) -> Iterator[None]:
    """Open a torch.distributed process group of this one process, and destroy it at the end."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
