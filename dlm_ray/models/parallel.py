"""Builds networks larger than one device: on meta, with activation checkpointing, compile and FSDP2; then initialises.

Training and serving use these functions. In training, the root is the module whose `forward` runs the whole objective,
because FSDP2 gathers and reduces parameters in hooks of `forward`. Embedding, final norm and head form the root's group
and stay gathered between forward and backward.

Parameters are float32: `materialize` allocates the master weights that the optimizer updates, and `shard` only casts
gathered copies to the precision of the run. A parameter is trained unless it has `requires_grad=False`, which the
caller sets. An adapter such as LoRA would be injected between `build` and `shard`: it would replace linear layers of
`HuggingFaceDenoiser.layers` while they are on the meta device, and freeze all other parameters, so that sharding,
materialisation and initialisation treat the adapter's matrices as any other parameter.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedConfig

from dlm_ray.models.denoiser import HuggingFaceDenoiser

STAYS_GATHERED_BYTES = 2**30


def build(
    config: PreTrainedConfig,
    mask_id: int | None,
    shift: bool,
    attention_kernel: str = "auto",
    *,
    remat: bool = False,
    compiled: bool = False,
) -> HuggingFaceDenoiser:
    """Return a denoiser on the meta device, which has shapes but no memory."""
    with torch.device("meta"):
        denoiser = HuggingFaceDenoiser(config, mask_id, shift, attention_kernel)
    if remat:
        denoiser.network.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        for layer in denoiser.layers:
            layer.compile()
    return denoiser


def shard(
    root: nn.Module, denoiser: HuggingFaceDenoiser, mesh: DeviceMesh, precision: str, replicated: set[nn.Parameter]
) -> None:
    """Shard with FSDP2 over `mesh`: one group per layer, and the rest with the root.

    Gathered weights and activations are in `precision`; sums, and the shards that the optimizer updates, in float32.
    Parameters in `replicated` are left to the caller: whole on every rank, float32, without reduction of their
    gradients.
    """
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if precision == "bf16"
        else MixedPrecisionPolicy()
    )
    # A small network stays gathered until its backward pass, which saves one collective per layer and micro-batch.
    is_large = sum(parameter.numel() for parameter in root.parameters()) * 4 > STAYS_GATHERED_BYTES
    for layer in denoiser.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=is_large)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=replicated)


def shard_frozen(denoiser: HuggingFaceDenoiser, mesh: DeviceMesh) -> None:
    """Shard a network that is not trained with FSDP2 over `mesh`.

    Each call of `hidden` or `reduce_logits` is collective and gathers the parameters that it needs: a layer while it
    runs; embedding, final norm and head during the call; none between calls.
    """
    for layer in denoiser.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(denoiser, mesh=mesh, reshard_after_forward=True)
    for method in ("hidden", "reduce_logits"):
        register_fsdp_forward_method(denoiser, method)


def materialize(denoiser: HuggingFaceDenoiser, device: torch.device) -> None:
    """Allocate meta parameters (with arbitrary values) and compute buffers (checkpoints lack rotary frequencies)."""
    network = denoiser.network
    network.to_empty(device=device)
    if network.config.tie_word_embeddings:
        # Without sharding, `to_empty` allocates tied weights separately.
        network.get_output_embeddings().weight = denoiser.embedding
    for module in network.modules():
        if "RotaryEmbedding" in type(module).__name__:
            network._init_weights(module)
        elif hasattr(module, "scalar_embed_scale"):  # Gemma's embedding
            module.embed_scale.fill_(module.scalar_embed_scale)  # type: ignore[operator, arg-type]


@torch.no_grad()
def initialize(denoiser: HuggingFaceDenoiser, seed: int, zero_head: bool = False) -> None:
    """Initialise all parameters as the families do, with values that do not depend on the number of workers.

    Each tensor is a function of (seed, its name): matrices N(0, initializer_range^2), GPT-2's residual projections with
    a standard deviation smaller by sqrt(2 layers), norms 1, biases 0; with `zero_head`, an untied head is 0.
    """
    config = denoiser.network.config
    head = denoiser.head
    for name, parameter in denoiser.network.named_parameters():
        owner, _, kind = name.rpartition(".")
        if kind == "bias" or (zero_head and parameter is head):
            full = torch.zeros(parameter.shape)
        elif parameter.ndim == 1:
            full = torch.ones(parameter.shape)
        else:
            std = config.initializer_range
            if config.model_type == "gpt2" and owner.endswith("c_proj"):
                std /= math.sqrt(2 * config.n_layer)
            full = torch.empty(parameter.shape).normal_(0.0, std, generator=named_generator(seed, name))
        copy_full(parameter, full)


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends only on the seed and the name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def full(parameter: Tensor) -> Tensor:
    """Return the whole of a parameter that may be sharded; collective."""
    whole = parameter.detach()
    return whole.full_tensor() if isinstance(whole, DTensor) else whole


def copy_full(parameter: Tensor, full: Tensor) -> None:
    """Copy the whole tensor `full`, which every rank has, into a parameter that may be sharded."""
    if isinstance(parameter, DTensor):
        placed = distribute_tensor(
            full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
        parameter.to_local().copy_(placed.to_local())
    else:
        parameter.copy_(full)
