"""Agreement between ranks: run an action on every rank, and raise the failure of one rank on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from dlm_ray.config.errors import UserError

Result = TypeVar("Result")


def gathered(act: Callable[[], Result], group: dist.ProcessGroup | None) -> list[Result]:
    """Run `act` on every rank and gather the results; if it fails on any rank, all ranks raise that error. Collective.

    Raises:
        UserError: the error of the failed rank, of the same class.
        RuntimeError: any other failure of another rank, with its text.
    """
    outcome: tuple[Result | None, Exception | None]
    try:
        outcome = (act(), None)
    except Exception as error:  # of any kind: the other ranks wait for the outcome
        outcome = (None, error)
    outcomes = [outcome]
    if dist.is_initialized():
        outcomes = [outcome] * dist.get_world_size(group)
        dist.all_gather_object(outcomes, (outcome[0], _sendable(outcome[1])), group=group)
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [cast(Result, result) for result, _ in outcomes]


def totals(counts: list[int], group: dist.ProcessGroup | None) -> list[int]:
    """Return the sums of small numbers over all ranks, by one message between hosts. Collective."""
    tensor = torch.tensor(counts)
    dist.all_reduce(tensor, group=group)
    sums: list[int] = tensor.tolist()
    return sums


def _sendable(error: Exception | None) -> Exception | None:
    """Return the error in a form that can be pickled and sent to other processes."""
    if error is None or isinstance(error, UserError):
        return None if error is None else type(error)(*error.args)
    return RuntimeError(f"{type(error).__name__}: {error}")
