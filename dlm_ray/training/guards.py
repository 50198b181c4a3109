"""Guards of a run: one writer and one recipe per run directory, and stop requests between two steps."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

from pydantic import ValidationError

from dlm_ray.config.errors import UserError
from dlm_ray.config.load import NOT_IN_RESULT
from dlm_ray.config.recipe import Recipe
from dlm_ray.config.trees import Tree, differences
from dlm_ray.data.index import Index

_Handler = Callable[[int, FrameType | None], object] | int | None
"""A handler as `signal.signal` takes and returns it."""
STOP_FILE = "stop"
"""A file of this name in a run directory makes the run commit after the current step and stop."""


@contextmanager
def sole_owner(run_dir: Path, name: str, *, patience_seconds: float = 0.0) -> Iterator[None]:
    """Hold `<run_dir>/<name>.lock` within the context; the operating system releases it when the process ends.

    The lock is a flock, and the file names its owner. It works across machines if the file system's flock does (NFS,
    Lustre with -o flock).

    Args:
        run_dir: the run directory; it is created if it does not exist.
        name: the name of the lock.
        patience_seconds: how long to wait for the current owner to end.

    Raises:
        UserError: if another process holds the lock; the error names its host, process and start.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / f"{name}.lock"
    deadline = time.monotonic() + patience_seconds
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{run_dir} belongs to a run in progress: {path.read_text().strip() or 'its owner is unknown'};"
                        " wait for it, stop it, or start another with `fresh`"
                    ) from error
            time.sleep(0.1)
        file.truncate(0)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, which began at {started}\n")
        file.flush()
        yield


class StopRequest:
    """A request to stop the run: SIGTERM to this process, or a file `stop` in the run directory.

    Within the context SIGTERM only sets the request; outside the main thread, which cannot set a handler, only the file
    counts.
    """

    def __init__(self, run_dir: Path):
        self._file = run_dir / STOP_FILE
        self._has_signal = False
        self._previous_handler: _Handler = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def _note(self, *_: object) -> None:
        self._has_signal = True

    def is_made(self) -> bool:
        """Return whether a stop is requested."""
        return self._has_signal or self._file.exists()

    def clear(self) -> None:
        """Remove the file, so that the next run continues."""
        self._file.unlink(missing_ok=True)


def data_identity(indexes: Sequence[Index]) -> list[str]:
    """Return, for each source, one hash of its training shards; their location does not matter."""
    return [
        hashlib.sha256("".join(shard.sha256 for shard in index.splits["train"].shards).encode()).hexdigest()
        for index in indexes
    ]


def check_same_run(
    recipe: Recipe,
    identity: list[str],
    checkpoint: str,
    checkpoint_recipe: Tree,
    checkpoint_identity: list[str],
) -> None:
    """Raise UserError, with every difference, unless a checkpoint belongs to this recipe's run.

    Keys that do not change the result may differ, and so may the folders of data and base.
    """
    try:
        saved = Recipe.model_validate(checkpoint_recipe)
    except ValidationError as error:
        raise UserError(
            f"{checkpoint} has a recipe that this version cannot read: {str(error).splitlines()[0]}; use another run "
            "directory"
        ) from error
    changes = [
        f"{key}: the checkpoint has {old}, the recipe has {new}"
        for key, old, new in differences(_result(saved), _result(recipe))
    ]
    if not changes and identity != checkpoint_identity:
        changes = ["data.sources: the checkpoint was trained on other shards"]
    if changes:
        listed = "\n".join(f"  - {change}" for change in changes)
        raise UserError(
            f"{checkpoint} belongs to another recipe:\n{listed}\n"
            "Change the recipe back, or use another run directory (`fresh`, `out`)"
        )


def _result(recipe: Recipe) -> Tree:
    """Return the fields of a recipe that change the result, without the folders of data and base."""
    content: Tree = recipe.model_dump(mode="json", exclude=NOT_IN_RESULT)
    for source in content["data"]["sources"]:
        del source["path"]
    if content["model"]["base"] is not None:
        content["model"]["base"] = os.path.basename(content["model"]["base"].rstrip("/"))
    return content
