"""A network that is larger than one device: meta build, activation checkpointing, compile, FSDP2, in that order; then memory and numbers.

Called by training and serving. In training the root is the module whose `forward` runs the whole objective, because FSDP2 gathers and reduces
parameters in hooks of `forward`; embedding, final norm and head are the root's own group and stay gathered between forward and
backward.
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
    """A denoiser on the meta device: shapes without memory."""
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
    """FSDP2 over `mesh`, a group a layer and the rest with the root; gathered weights and activations in `precision`, sums in float32.

    Parameters in `replicated` are left to the caller: whole on every rank, float32, their gradients not reduced.
    """
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if precision == "bf16"
        else MixedPrecisionPolicy()
    )
    # What fits many times over stays gathered until the backward pass has used it: one collective less a layer and micro-batch.
    is_large = sum(parameter.numel() for parameter in root.parameters()) * 4 > STAYS_GATHERED_BYTES
    for layer in denoiser.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=is_large)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=replicated)


def shard_frozen(denoiser: HuggingFaceDenoiser, mesh: DeviceMesh) -> None:
    """FSDP2 over `mesh` of a network that is not trained: each call of `hidden` or `reduce_logits` gathers what it needs, collectively.

    A layer is gathered for as long as it runs, embedding, final norm and head for as long as the call; nothing between calls.
    """
    for layer in denoiser.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(denoiser, mesh=mesh, reshard_after_forward=True)
    for method in ("hidden", "reduce_logits"):
        register_fsdp_forward_method(denoiser, method)


def materialize(denoiser: HuggingFaceDenoiser, device: torch.device) -> None:
    """Gives meta parameters memory (their numbers are garbage) and buffers their values (rotary frequencies are in no checkpoint)."""
    network = denoiser.network
    network.to_empty(device=device)
    if network.config.tie_word_embeddings:
        # Unsharded, the two ends of a tie were given memory one by one.
        network.get_output_embeddings().weight = network.get_input_embeddings().weight
    for module in network.modules():
        if "RotaryEmbedding" in type(module).__name__:
            network._init_weights(module)


@torch.no_grad()
def initialize(denoiser: HuggingFaceDenoiser, seed: int, zero_head: bool = False) -> None:
    """Numbers from scratch by the families' rule, the same on any number of workers: each tensor from (seed, its name).

    Matrices N(0, initializer_range^2), GPT-2's residual projections narrower by sqrt(2 layers), norms 1, biases 0; with `zero_head` an
    untied head 0.
    """
    config = denoiser.network.config
    head = denoiser.network.get_output_embeddings().weight
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
    """A CPU generator that depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def full(parameter: Tensor) -> Tensor:
    """The whole of a parameter of which this rank may hold a shard; collective."""
    whole = parameter.detach()
    return whole.full_tensor() if isinstance(whole, DTensor) else whole


def copy_full(parameter: Tensor, full: Tensor) -> None:
    """Copies the whole tensor `full`, which every rank has, into a parameter of which this rank may hold a shard."""
    if isinstance(parameter, DTensor):
        placed = distribute_tensor(
            full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
        parameter.to_local().copy_(placed.to_local())
    else:
        parameter.copy_(full)
