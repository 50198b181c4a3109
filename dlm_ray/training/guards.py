"""What keeps a run from harm: one writer a run directory, one recipe a run directory, and a request to stop that is obeyed between two steps."""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dlm_ray.config.errors import UserError
from dlm_ray.config.load import NOT_IN_RESULT
from dlm_ray.config.recipe import Recipe
from dlm_ray.config.trees import differences
from dlm_ray.data.index import Index

STOP_FILE = "stop"
"""In a run directory: its run commits at the next step and stops."""


@contextmanager
def sole_owner(run_dir: Path, name: str, *, patience_seconds: float = 0.0) -> Iterator[None]:
    """Holds `<run_dir>/<name>.lock` within the context; the operating system lets go of it when the process ends, however it ends.

    The lock is a flock, and the file says whose it is. It holds across machines where the file system's flock does (NFS, Lustre with -o flock).

    Args:
        run_dir: is made if need be.
        name: of the lock.
        patience_seconds: for an owner that is known to be ending.

    Raises:
        UserError: if another process has it, naming its host, process and start.
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
                        f"{run_dir} belongs to a run that is going on: {path.read_text().strip() or 'its owner has not said who it is'}; wait for it, "
                        "stop it, or start another with --fresh"
                    ) from error
            time.sleep(0.1)
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()}, which began at {datetime.now(UTC).isoformat(timespec='seconds')}\n"
        )
        file.flush()
        yield


class StopRequest:
    """Whether this process was sent SIGTERM, or somebody has put a file `stop` into the run directory.

    Within the context SIGTERM is noted and no more; outside the main thread, where no handler can be set, only the file counts.
    """

    def __init__(self, run_dir: Path):
        self._file = run_dir / STOP_FILE
        self._has_signal = False
        self._before: Any = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: object) -> None:
        self._has_signal = True

    def is_made(self) -> bool:
        """Asked between two steps."""
        return self._has_signal or self._file.exists()

    def obeyed(self) -> None:
        """The file is gone: the next run goes on."""
        self._file.unlink(missing_ok=True)


def data_identity(indexes: Sequence[Index]) -> list[str]:
    """The training shards of each source as one hash, wherever they lie."""
    return [
        hashlib.sha256("".join(shard.sha256 for shard in index.splits["train"].shards).encode()).hexdigest()
        for index in indexes
    ]


def check_same_run(
    recipe: Recipe, identity: list[str], checkpoint: str, its_recipe: dict[str, Any], its_identity: list[str]
) -> None:
    """Raises UserError, with every difference, unless a checkpoint is of this recipe's run.

    Keys that do not change the result may differ, and so may the folders in which data and base lie.
    """
    try:
        then = Recipe.model_validate(its_recipe)
    except ValidationError as error:
        raise UserError(
            f"{checkpoint} has a recipe that this version cannot read: {str(error).splitlines()[0]}; give the run another directory"
        ) from error
    changes = [
        f"{key}: it has {old}, and the recipe {new}" for key, old, new in differences(_result(then), _result(recipe))
    ]
    if not changes and identity != its_identity:
        changes = ["data.sources: it was trained on other shards"]
    if changes:
        listed = "\n".join(f"  - {change}" for change in changes)
        raise UserError(
            f"{checkpoint} belongs to another recipe:\n{listed}\nChange the recipe back, or give the run another directory (--fresh, --out)"
        )


def _result(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe changes the result, without where it lies."""
    content = recipe.model_dump(mode="json", exclude=NOT_IN_RESULT)
    for source in content["data"]["sources"]:
        del source["path"]
    if content["model"]["base"] is not None:
        content["model"]["base"] = os.path.basename(content["model"]["base"].rstrip("/"))
    return content
