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
    """What every query position of a micro-batch sees.

    `pattern` says what is seen of the future. `block_tokens` K ends the future at the border of a query's block of K positions (blocks
    are aligned to absolute positions). `half` L means that the row is [x_t ; x_0], two halves of L positions with the same position ids (BD3-LM,
    arXiv 2503.09573, section 3.2): x_t sees its own block in x_t and all earlier blocks in x_0; x_0 sees itself block by block, and never x_t.
    """

    pattern: Literal["causal", "bidirectional", "bernoulli", "window"]
    threshold: int = 0
    """`bernoulli`: a future key is seen where hash < threshold, of 2**32. `window`: so many future positions are seen."""
    salt: int = 0
    """Of `bernoulli`: the step, so that each step has a mask of its own."""
    document_ids: Tensor | None = None
    """[B, L] int; positions of different documents do not see each other. None: one document a row."""
    block_tokens: int | None = None
    """K; None: one block."""
    half: int | None = None
    """L of a row [x_t ; x_0] of 2L positions; None for a row that is itself."""
    offsets: tuple[int, ...] | None = None
    """Of rows that go on behind cached keys: the position of each row's first query; keys count from 0. None: queries count from 0, too."""

    def sees(self, row: Any, query: Any, key: Any) -> Any:
        """Whether `query` sees `key` in batch row `row`: integer tensors that broadcast, or one FlexAttention scalar each."""
        n, m = (query, key) if self.half is None else (query % self.half, key % self.half)  # positions in the text
        if self.pattern == "bidirectional":
            visible = (n == n) & (m == m)
        else:
            visible = m <= n
            if self.pattern == "bernoulli":
                visible = visible | (_hash(n, m, self.salt) < self.threshold)
            elif self.pattern == "window":
                visible = m <= n + self.threshold
        if self.block_tokens is not None:
            own, other = n // self.block_tokens, m // self.block_tokens
            if self.half is None:
                visible = visible & (other <= own)
            else:
                is_noisy, sees_noisy = query < self.half, key < self.half
                visible = (
                    (is_noisy & sees_noisy & (other == own) & visible)
                    | (is_noisy & ~sees_noisy & (other < own))
                    | (~is_noisy & ~sees_noisy & (other <= own) & visible)
                )
        if self.document_ids is not None:
            visible = visible & (self.document_ids[row, n] == self.document_ids[row, m])
        return visible

    def fused(self, num_queries: int, num_keys: int) -> Literal["causal", "full"] | None:
        """The kernel without a mask that computes this visibility, if there is one."""
        if self.document_ids is not None or self.half is not None or self.pattern not in ("causal", "bidirectional"):
            return None
        if self.offsets is None:
            if self.pattern == "causal" or self.block_tokens == 1:
                return "causal"
            return "full" if self.block_tokens is None or num_queries <= self.block_tokens else None
        # Behind a cache nothing is hidden from the whole last block, if it is every row's last.
        is_last = len(set(self.offsets)) == 1 and self.offsets[0] + num_queries == num_keys
        in_block = num_queries == 1 or (self.pattern == "bidirectional" and num_queries <= (self.block_tokens or 0))
        return "full" if is_last and in_block else None

    def positions(self, num_queries: int, device: torch.device) -> Tensor:
        """[1 or B, L] int64: the position ids of the queries; both halves of [x_t ; x_0] have the same."""
        position = torch.arange(num_queries, device=device)[None]
        if self.half is not None:
            return position % self.half
        if self.offsets is None:
            return position
        return torch.tensor(self.offsets, device=device)[:, None] + position

    def dense(self, num_queries: int, device: torch.device, num_keys: int | None = None) -> Tensor:
        """[B or 1, 1, queries, keys] bool, True where the query (third) sees the key (fourth); as many keys as queries if not said."""
        own = (
            torch.arange(num_queries, device=device)[None]
            if self.offsets is None
            else self.positions(num_queries, device)
        )
        query = own[:, :, None]
        key = torch.arange(num_queries if num_keys is None else num_keys, device=device)[None, None, :]
        rows = 1 if self.document_ids is None else self.document_ids.shape[0]
        return self.sees(torch.arange(rows, device=device)[:, None, None], query, key)[:, None]

    def block_mask(self, num_queries: int, device: torch.device, num_keys: int | None = None) -> Any:
        """The FlexAttention BlockMask of this visibility; not behind a cache, whose masks are small."""
        from torch.nn.attention.flex_attention import create_block_mask

        assert self.offsets is None, "what goes on behind a cache has a dense mask"
        num_rows = None if self.document_ids is None else self.document_ids.shape[0]
        keys = num_queries if num_keys is None else num_keys
        return create_block_mask(
            lambda b, h, q, k: self.sees(b, q, k), num_rows, None, num_queries, keys, device=str(device)
        )

    @property
    def is_static(self) -> bool:
        """Whether it is the same in every step, so that its mask can be kept."""
        return self.document_ids is None and self.pattern != "bernoulli" and self.offsets is None


def annealed(
    pattern: Literal["bernoulli", "window", "none"],
    ratio: float,
    step: int,
    num_positions: int,
    document_ids: Tensor | None,
) -> Visibility:
    """The visibility at annealing ratio r: causal at 0, bidirectional at 1, in between a share r of the future.

    Args:
        pattern: `bernoulli`: every future pair with probability r (DiffuLLaMA); `window`: the nearest r * (L - 1) future positions.
        ratio: r.
        step: gives each step its own Bernoulli mask.
        num_positions: L, or K where blocks of K end the future.
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
