"""When the state of a run is committed: a copy while the training waits, the writing behind its back, and what a failed save does."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from dlm_ray.checkpoint import commit, listing
from dlm_ray.checkpoint.layout import block_of
from dlm_ray.checkpoint.staging import Staging
from dlm_ray.config.errors import UserError
from dlm_ray.config.recipe import Checkpoint

log = logging.getLogger(__name__)


class Saved(NamedTuple):
    """How a save ended."""

    step: int
    directory: str | None
    """None if it failed and the run goes on."""
    metrics: dict[str, Any]
    """Of the step."""
    blocked_seconds: float
    """For which the training waited."""


class Saver:
    """The saves of one run on one rank; one is on its way at most. Every method is called on all ranks at the same step."""

    def __init__(self, recipe: Checkpoint, run_dir: Path, rank: int):
        self.recipe, self.run_dir, self.rank = recipe, str(run_dir), rank
        # Of its own, because its messages come when they come, and the step's may not be mixed with them.
        self._group = dist.new_group(backend="gloo")
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._on_its_way: tuple[int, str, Future[None], dict[str, Any]] | None = None
        self._blocked_seconds = 0.0

    def begin(
        self, step: int, tensors: Mapping[str, Tensor], fields: Mapping[str, Any], metrics: dict[str, Any]
    ) -> None:
        """Saves the state of `step`; asynchronously it returns once `tensors` are copied, and they may change."""
        assert self._on_its_way is None, "the save before has been ended"
        started = time.perf_counter()
        directory = listing.step_directory(self.run_dir, step)
        copied = self.recipe.asynchronous
        blocks = self._staging.fill(tensors) if copied else {name: block_of(tensor) for name, tensor in tensors.items()}

        def write() -> None:
            commit.save_blocks(directory, blocks, fields, group=self._group)
            if self.rank == 0:
                kept = {"keep_best": self.recipe.keep_best, "keep_every_steps": self.recipe.keep_every_steps}
                listing.prune(self.run_dir, self.recipe.keep_last, **kept)

        future = self._thread.submit(write)
        self._on_its_way = (step, directory, future, metrics)
        if not self.recipe.asynchronous:
            future.exception()
        self._blocked_seconds = time.perf_counter() - started

    def is_over(self) -> bool:
        """Whether this rank's part of the save that is on its way has ended, well or not."""
        return self._on_its_way is not None and self._on_its_way[2].done()

    def end(self, *, has_to_succeed: bool = False) -> Saved | None:
        """Waits for the save that is on its way, if one is.

        Raises:
            UserError: if it failed and `checkpoint.on_failed_save` says stop, or it has to succeed. Any other error always.
        """
        if self._on_its_way is None:
            return None
        (step, directory, future, metrics), self._on_its_way = self._on_its_way, None
        started = time.perf_counter()
        error = future.exception()
        blocked = self._blocked_seconds + time.perf_counter() - started
        if error is None:
            return Saved(step, directory, metrics, blocked)
        if self.rank == 0 and not listing.is_committed(directory):
            self._remove(directory)
        if has_to_succeed or self.recipe.on_failed_save == "stop" or not isinstance(error, UserError):
            raise error
        log.warning("the checkpoint of step %d failed, and the run goes on without it: %s", step, error)
        return Saved(step, None, metrics, blocked)

    def close(self) -> None:
        """Lets a save that is on its way come to its end, so that no write goes on behind whoever reads the directory next."""
        self._thread.shutdown()

    @staticmethod
    def _remove(directory: str) -> None:
        """What a failed save left takes room that the next one may need."""
        try:
            listing.remove(directory)
        except (OSError, ValueError) as error:
            log.warning("%s could not be removed: %s", directory, error)
