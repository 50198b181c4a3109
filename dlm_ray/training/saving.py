"""The saves of a run: a copy while the training waits, the write in a thread, and how failed saves are handled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from dlm_ray.checkpoint import commit, listing
from dlm_ray.checkpoint.layout import block_of
from dlm_ray.checkpoint.staging import Staging
from dlm_ray.config.errors import UserError
from dlm_ray.config.manifest_fields import RunMetrics
from dlm_ray.config.recipe import Checkpoint

log = logging.getLogger(__name__)


class Snapshot(NamedTuple):
    """The state of a step, before it is copied."""

    tensors: Mapping[str, Tensor]
    """Every tensor by its name in the checkpoint."""
    fields: Mapping[str, object]
    """The fields of the manifest."""
    metrics: RunMetrics
    """The metrics of the step, for the report of the save."""


class Saved(NamedTuple):
    """The result of a save."""

    step: int
    directory: str | None
    """The committed directory; None if the save failed and the run continues."""
    metrics: RunMetrics
    """The metrics of `step`."""
    blocked_seconds: float
    """How long the training waited for the save."""


class _Pending(NamedTuple):
    """A save in progress."""

    step: int
    directory: str
    future: Future[None]
    metrics: RunMetrics


class Saver:
    """The saves of one run on one rank, at most one at a time; all ranks call every method at the same step."""

    def __init__(self, recipe: Checkpoint, run_dir: Path, rank: int):
        self.recipe, self.run_dir, self.rank = recipe, str(run_dir), rank
        # A group of its own: the thread sends messages at any time, and they must not mix with those of the step.
        self._group = dist.new_group(backend="gloo")
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None
        self._blocked_seconds = 0.0
        self._has_saved_for_leaving_machine = False

    def after_step(
        self,
        step: int,
        snapshot: Callable[[], Snapshot],
        *,
        is_last: bool,
        is_stopping: bool,
        is_machine_leaving: bool,
        is_done_everywhere: bool,
    ) -> Iterator[Saved]:
        """Apply the saving policy after `step`, and yield every save that finishes meanwhile.

        A save begins every `checkpoint.every_steps` steps, at the last step, before a stop, and the first time that a
        machine leaves. The last save, and the save before a stop, must succeed. The training waits for these, for a
        save from a leaving machine, and for every save with `checkpoint.asynchronous=false`.

        Args:
            step: the number of steps taken.
            snapshot: returns the state of the step; called only if a save begins.
            is_last: whether `step` is the last one of the run.
            is_stopping: whether the run stops after this step.
            is_machine_leaving: whether the machine of any rank is about to be taken away.
            is_done_everywhere: whether every rank has finished its part of the save in progress.

        Raises:
            UserError: see `end`.
        """
        if is_done_everywhere:
            yield from self._finished()
        is_due = step % self.recipe.every_steps == 0 or is_last
        if is_due or is_stopping or (is_machine_leaving and not self._has_saved_for_leaving_machine):
            state = snapshot()
            yield from self._finished()
            self.begin(step, *state)
        if is_last or is_stopping or is_machine_leaving or not self.recipe.asynchronous:
            yield from self._finished(must_succeed=is_last or is_stopping)
        self._has_saved_for_leaving_machine |= is_machine_leaving

    def _finished(self, *, must_succeed: bool = False) -> Iterator[Saved]:
        """Wait for the save in progress, if any, and yield it."""
        saved = self.end(must_succeed=must_succeed)
        if saved is not None:
            yield saved

    def begin(
        self, step: int, tensors: Mapping[str, Tensor], fields: Mapping[str, object], metrics: RunMetrics
    ) -> None:
        """Save the state of `step`; if asynchronous, return once `tensors` are copied and may change."""
        assert self._pending is None, "the previous save must end before the next one begins"
        started = time.perf_counter()
        directory = listing.step_directory(self.run_dir, step)
        if self.recipe.asynchronous:
            blocks = self._staging.fill(tensors)
        else:
            blocks = {name: block_of(tensor) for name, tensor in tensors.items()}

        def write() -> None:
            commit.save_blocks(directory, blocks, fields, group=self._group)
            if self.rank == 0:
                listing.prune(
                    self.run_dir,
                    self.recipe.keep_last,
                    keep_best=self.recipe.keep_best,
                    keep_every_steps=self.recipe.keep_every_steps,
                )

        future = self._thread.submit(write)
        self._pending = _Pending(step, directory, future, metrics)
        if not self.recipe.asynchronous:
            future.exception()
        self._blocked_seconds = time.perf_counter() - started

    def is_done(self) -> bool:
        """Return whether this rank's part of the save in progress has ended, successfully or not."""
        return self._pending is not None and self._pending.future.done()

    def end(self, *, must_succeed: bool = False) -> Saved | None:
        """Wait for the save in progress, if any.

        Raises:
            UserError: if the save failed, and `checkpoint.on_failed_save` is `stop` or the save must succeed. Any other
                type of error is always raised.
        """
        if self._pending is None:
            return None
        (step, directory, future, metrics), self._pending = self._pending, None
        started = time.perf_counter()
        error = future.exception()
        blocked = self._blocked_seconds + time.perf_counter() - started
        if error is None:
            return Saved(step, directory, metrics, blocked)
        if self.rank == 0 and not listing.is_committed(directory):
            self._remove(directory)
        if must_succeed or self.recipe.on_failed_save == "stop" or not isinstance(error, UserError):
            raise error
        log.warning("the checkpoint of step %d failed, and the run continues without it: %s", step, error)
        return Saved(step, None, metrics, blocked)

    def close(self) -> None:
        """Wait for the save in progress, so that no write continues after the run has ended."""
        self._thread.shutdown()

    @staticmethod
    def _remove(directory: str) -> None:
        """Remove the files of a failed save: they take room that the next save may need."""
        try:
            listing.remove(directory)
        except (OSError, ValueError) as error:
            log.warning("%s could not be removed: %s", directory, error)
