"""Adjustments of the logits before tokens are sampled from them, on a whole canvas and in blocks.

Temperature, nucleus and confidence are computed from the adjusted logits. A token with logit -inf is never sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Adjust = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [n, V], rows [n], positions [n]) -> logits [n, V]; `rows` has the row or request number of each, `positions`
its absolute position in the sequence."""


def banned(ids: Iterable[int]) -> Adjust:
    """Return an adjustment that never samples the tokens `ids`."""
    banned_ids = torch.tensor(sorted(ids), dtype=torch.long)

    def adjust(logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        return logits.index_fill(1, banned_ids.to(logits.device), float("-inf"))

    return adjust


def forced(tokens: Mapping[int, int]) -> Adjust:
    """Return an adjustment that fixes the token at each position in `tokens`; apply it after all other adjustments."""
    last = max(tokens, default=0)
    table = torch.full((last + 2,), -1)  # the last entry is for all later positions
    for position, token in tokens.items():
        table[position] = token

    def adjust(logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        token = table.to(logits.device)[positions.clamp(max=last + 1)]
        certain = torch.full_like(logits, float("-inf")).scatter(1, token.clamp(min=0)[:, None], 0.0)
        return torch.where(token[:, None] >= 0, certain, logits)

    return adjust


def pattern(allowed: Mapping[int, Iterable[int]]) -> Adjust:
    """Return an adjustment that allows only the given set of tokens at each position in `allowed`.

    Raises:
        ValueError: if the set of a position is empty.
    """
    pattern_positions = sorted(allowed)
    sets = [torch.tensor(sorted(allowed[position]), dtype=torch.long) for position in pattern_positions]
    for position, ids in zip(pattern_positions, sets, strict=True):
        if not len(ids):
            raise ValueError(
                f"the pattern allows no token at position {position}; give it one, or leave the position out"
            )

    def adjust(logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        for position, ids in zip(pattern_positions, sets, strict=True):
            only = torch.full(logits.shape[1:], float("-inf"), device=logits.device).index_fill(
                0, ids.to(logits.device), 0.0
            )
            logits = torch.where((positions == position)[:, None], logits + only, logits)
        return logits

    return adjust


def chained(*adjusts: Adjust | None) -> Adjust | None:
    """Return an adjustment that applies all of `adjusts` in order, or None if all are None."""
    present = [adjust for adjust in adjusts if adjust is not None]
    if not present:
        return None

    def adjust(logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        for apply in present:
            logits = apply(logits, rows, positions)
        return logits

    return adjust
