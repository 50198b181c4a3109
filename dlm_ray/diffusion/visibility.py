"""Defines which positions attend to which, as a predicate of (sequence, query position, key position).

The predicate becomes a dense mask, a FlexAttention BlockMask, or a fused kernel that needs no mask. Annealing
(DiffuLLaMA, arXiv 2410.17891, section 3.3) is a hash of (query, key, step) that the kernel evaluates, so that no L x L
matrix is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_LOW_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Visibility:
    """The keys that every query position of a micro-batch attends to.

    `pattern` defines which future positions a query sees. `block_tokens` K limits the future to the query's block of K
    positions (blocks are aligned to absolute positions). `half` L means that the sequence is [x_t ; x_0], two halves of
    L positions with the same position ids (BD3-LM, arXiv 2503.09573, section 3.2): x_t sees its own block in x_t and
    all earlier blocks in x_0; x_0 sees itself block by block (causally with `is_context_causal`), and never x_t.
    """

    pattern: Literal["causal", "bidirectional", "bernoulli", "window"]
    """`causal`: no future position; `bidirectional`: all; `bernoulli`: a random subset; `window`: the nearest ones."""
    hash_limit: int = 0
    """`bernoulli`: a query sees a future key if their hash, in [0, 2**32), is below this limit."""
    salt: int = 0
    """`bernoulli`: the step, so that each step has a different mask."""
    window_tokens: int = 0
    """`window`: the number of future positions that a query sees."""
    document_ids: Tensor | None = None
    """[B, L] int; positions of different documents do not see each other. None: one document per sequence."""
    block_tokens: int | None = None
    """K, the positions of a block; None: one block."""
    half: int | None = None
    """L, for sequences [x_t ; x_0] of 2L positions; None for ordinary sequences."""
    is_context_causal: bool = False
    """Whether x_0 in [x_t ; x_0] sees no future position, not even within a block: the attention of the AR base."""
    offsets: tuple[int, ...] | None = None
    """For queries after cached keys: the position of each sequence's first query; keys count from 0. None: all 0."""
    causal_sequences: tuple[bool, ...] | None = None
    """[B]: whether a sequence sees no future position, whatever the pattern is. None: no sequence."""

    def sees(self, sequence: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return whether position `query` sees position `key` in sequence `sequence` of the batch.

        The arguments are integer tensors that broadcast; FlexAttention passes scalars.
        """
        n, m = (query, key) if self.half is None else (query % self.half, key % self.half)  # positions in the sequence
        if self.pattern == "bidirectional":
            visible = (n == n) & (m == m)
        else:
            visible = m <= n
            if self.pattern == "bernoulli":
                visible = visible | (_hash(n, m, self.salt) < self.hash_limit)
            elif self.pattern == "window":
                visible = m <= n + self.window_tokens
        if self.block_tokens is not None:
            query_block, key_block = n // self.block_tokens, m // self.block_tokens
            if self.half is None:
                visible = visible & (key_block <= query_block)
            else:
                is_noisy, sees_noisy = query < self.half, key < self.half
                context = (m <= n) if self.is_context_causal else (key_block <= query_block) & visible
                visible = (
                    (is_noisy & sees_noisy & (key_block == query_block) & visible)
                    | (is_noisy & ~sees_noisy & (key_block < query_block))
                    | (~is_noisy & ~sees_noisy & context)
                )
        if self.causal_sequences is not None:
            is_causal = torch.tensor(self.causal_sequences, device=n.device)[sequence]
            visible = visible & ((m <= n) | ~is_causal)
        if self.document_ids is not None:
            visible = visible & (self.document_ids[sequence, n] == self.document_ids[sequence, m])
        return visible

    def fused(self, num_queries: int, num_keys: int) -> Literal["causal", "full"] | None:
        """Return the kernel without a mask that computes this visibility, or None."""
        if self.document_ids is not None or self.half is not None or self.pattern not in ("causal", "bidirectional"):
            return None
        if self.causal_sequences is not None and any(self.causal_sequences):
            return None
        if self.offsets is None:
            if self.pattern == "causal" or self.block_tokens == 1:
                return "causal"
            return "full" if self.block_tokens is None or num_queries <= self.block_tokens else None
        # After a cache, the last block sees all keys, if the sequences have the same length.
        is_last = len(set(self.offsets)) == 1 and self.offsets[0] + num_queries == num_keys
        in_block = num_queries == 1 or (self.pattern == "bidirectional" and num_queries <= (self.block_tokens or 0))
        return "full" if is_last and in_block else None

    def positions(self, num_queries: int, device: torch.device) -> Tensor:
        """Return the position ids of the queries, [1 or B, L] int64; both halves of [x_t ; x_0] have the same ones."""
        position = torch.arange(num_queries, device=device)[None]
        if self.half is not None:
            return position % self.half
        if self.offsets is None:
            return position
        return torch.tensor(self.offsets, device=device)[:, None] + position

    def dense(self, num_queries: int, device: torch.device, num_keys: int | None = None) -> Tensor:
        """Return the dense mask [B or 1, 1, queries, keys] bool, True where the query sees the key.

        `num_keys` defaults to `num_queries`.
        """
        query = (
            torch.arange(num_queries, device=device)[None]
            if self.offsets is None
            else self.positions(num_queries, device)
        )
        query = query[:, :, None]
        key = torch.arange(num_queries if num_keys is None else num_keys, device=device)[None, None, :]
        num_sequences = 1 if self.document_ids is None else self.document_ids.shape[0]
        if self.causal_sequences is not None:
            num_sequences = len(self.causal_sequences)
        return self.sees(torch.arange(num_sequences, device=device)[:, None, None], query, key)[:, None]

    def block_mask(self, num_queries: int, device: torch.device, num_keys: int | None = None) -> BlockMask:
        """Return the FlexAttention BlockMask of this visibility; it does not support offsets, whose masks are small."""
        from torch.nn.attention.flex_attention import create_block_mask

        assert self.offsets is None, "queries after a cache have a dense mask"
        num_sequences = None if self.document_ids is None else self.document_ids.shape[0]
        keys = num_queries if num_keys is None else num_keys
        return create_block_mask(
            lambda b, h, q, k: self.sees(b, q, k), num_sequences, None, num_queries, keys, device=str(device)
        )

    @property
    def is_static(self) -> bool:
        """Whether the visibility is the same in every step, so that its mask can be cached."""
        return self.document_ids is None and self.pattern != "bernoulli" and self.offsets is None


def annealed(
    pattern: Literal["bernoulli", "window", "none"],
    ratio: float,
    step: int,
    num_positions: int,
    document_ids: Tensor | None,
) -> Visibility:
    """Return the visibility at annealing ratio r: causal at 0, bidirectional at 1, in between a share r of the future.

    Args:
        pattern: `bernoulli`: every future pair with probability r (DiffuLLaMA); `window`: the nearest r * (L - 1)
            future positions; `none`: bidirectional.
        ratio: the annealing ratio r.
        step: the training step; each step has its own Bernoulli mask.
        num_positions: L, or K if blocks of K limit the future.
        document_ids: [B, L], or None for one document per sequence.
    """
    if pattern == "none" or ratio >= 1:
        return Visibility("bidirectional", document_ids=document_ids)
    if ratio <= 0:
        return Visibility("causal", document_ids=document_ids)
    if pattern == "window":
        return Visibility("window", window_tokens=round(ratio * (num_positions - 1)), document_ids=document_ids)
    return Visibility("bernoulli", hash_limit=round(ratio * 2**32), salt=step, document_ids=document_ids)


def documents_apart(document_ids: np.ndarray, document_mask: bool, device: torch.device) -> Tensor | None:
    """Return groups [B, L] int32 that do not see each other, or None if each sequence is one group.

    None allows the faster kernels. Without a document mask, only padding is a separate group.
    """
    groups = document_ids if document_mask else np.minimum(document_ids, 0)
    if (groups == groups[:, :1]).all():
        return None
    return torch.from_numpy(groups).to(device, non_blocking=True)


def _hash(query: Tensor, key: Tensor, salt: int) -> Tensor:
    """Return a 32-bit hash of (query, key, salt), in int64 arithmetic that eager tensors and FlexAttention share."""
    return _mix(_mix((query + 0x9E3779B9 * salt) & _LOW_32) + key)


def _mix(x: Tensor) -> Tensor:
    """Mix the bits of a 32-bit integer (a bijection with good avalanche: two multiply-xorshift rounds)."""
    x = x & _LOW_32
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _LOW_32
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _LOW_32
    return x ^ (x >> 16)
