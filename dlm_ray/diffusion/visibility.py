"""Who may attend to whom, as one predicate of (row, query position, key position).

From the predicate come a dense mask, a FlexAttention BlockMask, or the knowledge that a fused kernel needs no mask at all.
Annealing (DiffuLLaMA, arXiv 2410.17891, section 3.3) is a hash of (query, key, step): the kernel evaluates it and no L x L matrix
is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Visibility:
    """What every query position of a micro-batch sees."""

    pattern: Literal["causal", "bidirectional", "bernoulli", "window"]
    threshold: int = 0
    """`bernoulli`: a future key is seen where hash < threshold, of 2**32. `window`: so many future positions are seen."""
    salt: int = 0
    """Of `bernoulli`: the step, so that each step has a mask of its own."""
    document_ids: Tensor | None = None
    """[B, L] int; positions of different documents do not see each other. None: one document a row."""

    def sees(self, row: Any, query: Any, key: Any) -> Any:
        """Whether `query` sees `key` in batch row `row`: integer tensors that broadcast, or one FlexAttention scalar each."""
        if self.pattern == "bidirectional":
            visible = query == query
            visible = visible & (key == key)
        else:
            visible = key <= query
            if self.pattern == "bernoulli":
                visible = visible | (_hash(query, key, self.salt) < self.threshold)
            elif self.pattern == "window":
                visible = key <= query + self.threshold
        if self.document_ids is not None:
            visible = visible & (self.document_ids[row, query] == self.document_ids[row, key])
        return visible

    @property
    def fused(self) -> Literal["causal", "full"] | None:
        """The kernel without a mask that computes this visibility, if there is one."""
        if self.document_ids is not None or self.pattern not in ("causal", "bidirectional"):
            return None
        return "causal" if self.pattern == "causal" else "full"

    def dense(self, num_positions: int, device: torch.device) -> Tensor:
        """[B or 1, 1, L, L] bool, True where the query (third) sees the key (fourth)."""
        position = torch.arange(num_positions, device=device)
        query, key = position[:, None], position[None, :]
        if self.document_ids is None:
            return self.sees(0, query, key)[None, None]
        row = torch.arange(self.document_ids.shape[0], device=device)[:, None, None]
        return self.sees(row, query[None], key[None])[:, None]

    def block_mask(self, num_positions: int, device: torch.device) -> Any:
        """The FlexAttention BlockMask of this visibility for L = num_positions."""
        from torch.nn.attention.flex_attention import create_block_mask

        num_rows = None if self.document_ids is None else self.document_ids.shape[0]
        return create_block_mask(lambda b, h, q, k: self.sees(b, q, k), num_rows, None, num_positions, num_positions, device=str(device))


def annealed(
    pattern: Literal["bernoulli", "window", "none"], ratio: float, step: int, num_positions: int, document_ids: Tensor | None
) -> Visibility:
    """The visibility at annealing ratio r: causal at 0, bidirectional at 1, in between a share r of the future.

    Args:
        pattern: `bernoulli`: every future pair with probability r (DiffuLLaMA); `window`: the nearest r * (L - 1) future positions.
        ratio: r.
        step: gives each step its own Bernoulli mask.
        num_positions: L.
        document_ids: [B, L] or None.
    """
    if pattern == "none" or ratio >= 1:
        return Visibility("bidirectional", document_ids=document_ids)
    if ratio <= 0:
        return Visibility("causal", document_ids=document_ids)
    if pattern == "window":
        return Visibility("window", threshold=round(ratio * (num_positions - 1)), document_ids=document_ids)
    return Visibility("bernoulli", threshold=round(ratio * 2**32), salt=step, document_ids=document_ids)


def documents_apart(document_ids: np.ndarray, document_mask: bool, device: torch.device) -> Tensor | None:
    """[B, L] int32 groups that do not see each other, or None if nothing has to be kept apart (which lets the faster kernels run).

    Without a document mask, padding alone is kept apart.
    """
    groups = document_ids if document_mask else np.minimum(document_ids, 0)
    if (groups == groups[:, :1]).all():
        return None
    return torch.from_numpy(groups).to(device, non_blocking=True)


def _hash(query: Any, key: Any, salt: int) -> Any:
    """32 well-mixed bits of (query, key, salt), in int64 arithmetic that eager tensors and FlexAttention's kernels share."""
    return _mix(_mix((query + 0x9E3779B9 * salt) & _LOW_32) + key)


def _mix(x: Any) -> Any:
    """A bijection of 32-bit integers with good avalanche (two multiply-xorshift rounds)."""
    x = x & _LOW_32
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _LOW_32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _LOW_32
    return x ^ (x >> 16)
