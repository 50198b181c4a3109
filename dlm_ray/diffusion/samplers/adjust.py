"""Control over what is drawn: functions that change the logits before a token is drawn from them, on either canvas.

Temperature, nucleus and confidence see the adjusted logits. -inf is never drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Adjust = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits [n, V], rows [n], positions [n]) -> logits [n, V]: of which row (or request) and absolute position of its text each one is."""


def banned(ids: Iterable[int]) -> Adjust:
    """These tokens are never drawn."""
    never = torch.tensor(sorted(ids), dtype=torch.long)

    def adjust(logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        return logits.index_fill(1, never.to(logits.device), float("-inf"))

    return adjust


def forced(tokens: Mapping[int, int]) -> Adjust:
    """The token at each of these positions, whatever the model and other adjustments say; apply it last."""
    last = max(tokens, default=0)
    table = torch.full((last + 2,), -1)  # its last entry is that of all positions behind
    for position, token in tokens.items():
        table[position] = token

    def adjust(logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        token = table.to(logits.device)[positions.clamp(max=last + 1)]
        certain = torch.full_like(logits, float("-inf")).scatter(1, token.clamp(min=0)[:, None], 0.0)
        return torch.where(token[:, None] >= 0, certain, logits)

    return adjust


def pattern(allowed: Mapping[int, Iterable[int]]) -> Adjust:
    """At each of these positions, only its own set of tokens.

    Raises:
        ValueError: if a position has no token left.
    """
    positions_of = sorted(allowed)
    sets = [torch.tensor(sorted(allowed[position]), dtype=torch.long) for position in positions_of]
    for position, ids in zip(positions_of, sets, strict=True):
        if not len(ids):
            raise ValueError(
                f"the pattern allows no token at position {position}; give it one, or leave the position out"
            )

    def adjust(logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        for position, ids in zip(positions_of, sets, strict=True):
            only = torch.full(logits.shape[1:], float("-inf"), device=logits.device).index_fill(
                0, ids.to(logits.device), 0.0
            )
            logits = torch.where((positions == position)[:, None], logits + only, logits)
        return logits

    return adjust


def chained(*adjusts: Adjust | None) -> Adjust | None:
    """One after the other; None if there is none."""
    present = [adjust for adjust in adjusts if adjust is not None]
    if not present:
        return None

    def adjust(logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        for each in present:
            logits = each(logits, rows, positions)
        return logits

    return adjust
