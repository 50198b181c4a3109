"""Fault isolation: find the sequences whose step fails, and run the step of all others.

A sampler's step that raises leaves every sequence before or after the step, never within it, so the step may be
repeated. It is first repeated for all sequences, in case the failure was transient, and then for halves, until each
sequence whose step raises is found. All others have made their step, with unchanged random numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.generation.text_model import TextModel

log = logging.getLogger("dlm_ray.serving")
T = TypeVar("T")


class NetworkLost(RuntimeError):
    """The network fails for every input: the replica has to be replaced."""


def isolate_failures(step: Callable[[Sequence[T]], None], group: Sequence[T]) -> list[tuple[T, Exception]]:
    """Run a step for all members of a group except those for which it raises; return these with their errors.

    Args:
        step: runs the step for some members of the group. When it raises, it may have run for some of them; it must
            skip these when it is repeated.
        group: the members.
    """
    try:
        step(group)
        return []
    except Exception as error:
        log.warning("a step of %d sequences failed; repeating it to isolate the failure", len(group), exc_info=error)
        _free_memory(error)
    return _bisect(step, list(group))


def check_network(model: TextModel) -> None:
    """Raise NetworkLost if the network fails for an input of one token."""
    try:
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        model.denoiser.hidden(token, Visibility(model.pattern)).cpu()
    except Exception as error:
        raise NetworkLost("the network fails for every input") from error


def _bisect(step: Callable[[Sequence[T]], None], group: Sequence[T]) -> list[tuple[T, Exception]]:
    try:
        step(group)
        return []
    except Exception as error:
        _free_memory(error)
        if len(group) == 1:
            return [(group[0], error)]
    middle = len(group) // 2
    return [*_bisect(step, group[:middle]), *_bisect(step, group[middle:])]


def _free_memory(error: Exception) -> None:
    """Empty the CUDA allocator's cache after an out-of-memory error."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
