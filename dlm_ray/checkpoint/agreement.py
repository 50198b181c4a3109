"""All ranks or none: what one rank does while the others wait, and how its failure becomes everybody's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from dlm_ray.config.errors import UserError


def gathered(act: Callable[[], Any], group: dist.ProcessGroup | None) -> list[Any]:
    """Runs `act` on every rank and gathers the results; if it failed on any, every rank raises that error. Collective.

    Raises:
        UserError: of the rank that had one, of the same class.
        RuntimeError: for any other failure of another rank, with its text.
    """
    outcome: tuple[Any, Exception | None]
    try:
        outcome = (act(), None)
    except Exception as error:  # whatever it was, the other ranks are waiting to hear of it
        outcome = (None, error)
    outcomes = [outcome]
    if dist.is_initialized():
        outcomes = [outcome] * dist.get_world_size(group)
        dist.all_gather_object(outcomes, (outcome[0], _sendable(outcome[1])), group=group)
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [result for result, _ in outcomes]


def totals(counts: list[int], group: dist.ProcessGroup | None) -> list[int]:
    """Sums of small numbers over all ranks, on the host: one message, which no device waits for. Collective."""
    tensor = torch.tensor(counts)
    dist.all_reduce(tensor, group=group)
    found: list[int] = tensor.tolist()
    return found


def _sendable(error: Exception | None) -> Exception | None:
    """The error without what cannot travel between processes."""
    if error is None or isinstance(error, UserError):
        return None if error is None else type(error)(*error.args)
    return RuntimeError(f"{type(error).__name__}: {error}")
