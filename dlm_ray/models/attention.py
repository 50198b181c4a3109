"""The attention function registered with transformers, which computes the given visibility and ignores the model's own.

A Denoiser prepares a Visibility once per micro-batch and passes it through the model's keyword arguments. No mask
function is registered under the same name, so transformers builds no mask (and does not look for packed sequences in
the position ids).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from dlm_ray.config.errors import UserError
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.models.kv_cache import KeyValueSource

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

NAME = "dlm_ray"


@dataclass(frozen=True)
class PreparedVisibility:
    """A visibility in the form that a kernel takes."""

    kernel: Literal["sdpa", "flex", "flash"]
    is_causal: bool = False
    mask: Tensor | None = None
    """[B or 1, 1, queries, keys] bool for sdpa; None if the kernel needs no mask."""
    block_mask: BlockMask | None = None
    """The mask for flex."""
    kv: KeyValueSource | None = None
    """Keys and values of other passes that this pass attends to."""


def prepare(
    visibility: Visibility, attention: str, num_queries: int, num_keys: int, device: torch.device
) -> PreparedVisibility:
    """Select the kernel and build its mask, once for all layers; a static mask is built once for all steps.

    Args:
        visibility: the visibility of the micro-batch.
        attention: the recipe's `model.attention`.
        num_queries, num_keys: lengths in one layer's attention.
        device: device of the network.

    Raises:
        UserError: if `attention` is flash, which cannot compute this visibility.
    """
    fused = visibility.fused(num_queries, num_keys)
    if fused is not None:
        return PreparedVisibility("flash" if attention == "flash" else "sdpa", is_causal=fused == "causal")
    if attention == "flash":
        raise UserError(
            "model.attention=flash computes only plain causal and bidirectional attention, but this run anneals, masks "
            "documents or attends in blocks; set model.attention=auto, or curriculum.annealing.pattern=none "
            "and data.document_mask=false"
        )
    is_flex = visibility.offsets is None and (attention == "flex" or (attention == "auto" and device.type == "cuda"))
    if visibility.is_static:
        return _kept(visibility, is_flex, num_queries, num_keys, device)
    return _masked(visibility, is_flex, num_queries, num_keys, device)


def _masked(
    visibility: Visibility, is_flex: bool, num_queries: int, num_keys: int, device: torch.device
) -> PreparedVisibility:
    if is_flex:
        return PreparedVisibility("flex", block_mask=visibility.block_mask(num_queries, device, num_keys))
    return PreparedVisibility("sdpa", mask=visibility.dense(num_queries, device, num_keys))


_kept = lru_cache(maxsize=8)(_masked)


def forget_masks() -> None:
    """Drop the masks cached between steps; the next step builds them again."""
    _kept.cache_clear()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    visibility: PreparedVisibility | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return the attention output [B, L, H, D/H] of queries [B, H, L, D/H] and keys and values [B, <= H, L, D/H]."""
    assert visibility is not None, f"{type(module).__name__} does not pass the visibility on to its attention"
    if visibility.kv is None:
        return _attend(visibility, visibility.mask, query, key, value, scaling), None
    groups = visibility.kv.extend(cast(int, module.layer_idx), key, value)
    if len(groups) == 1:
        return _attend(visibility, visibility.mask, query, *groups[0], scaling), None
    assert visibility.mask is not None, "rows after the end of others have a mask"
    mixed, first = [], 0
    for group_key, group_value in groups:
        rows = slice(first, first + len(group_key))
        mixed.append(_attend(visibility, visibility.mask[rows], query[rows], group_key, group_value, scaling))
        first = rows.stop
    return torch.cat(mixed), None


def _attend(
    visibility: PreparedVisibility,
    mask: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
) -> Tensor:
    """Return the output [B, L, H, D/H] of the kernel of `visibility` with the mask of these rows."""
    grouped = query.shape[1] != key.shape[1]
    if visibility.kernel == "flash":
        from flash_attn import flash_attn_func

        mixed: Tensor = flash_attn_func(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            softmax_scale=scaling,
            causal=visibility.is_causal,
        )
        return mixed
    if visibility.kernel == "flex":
        mixed = _flex(query.device.type)(
            query, key, value, block_mask=visibility.block_mask, scale=scaling, enable_gqa=grouped
        )
    else:
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=visibility.is_causal, scale=scaling, enable_gqa=grouped
        )
    return mixed.transpose(1, 2).contiguous()


@cache
def _flex(device_type: str) -> Callable[..., Tensor]:
    """Return FlexAttention, compiled if there is a GPU (uncompiled it stores the scores)."""
    from torch.nn.attention.flex_attention import flex_attention

    kernel = torch.compile(flex_attention) if device_type == "cuda" else flex_attention
    return cast("Callable[..., Tensor]", kernel)


AttentionInterface.register(NAME, attend)
