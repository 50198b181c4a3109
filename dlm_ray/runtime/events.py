"""Follow a run's metrics.jsonl, and its steps in between, from another process."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.training.metrics import PROGRESS_FILE

OnEvent = Callable[[JsonObject], None]
"""Called with the fields of one line of metrics.jsonl, and between the lines with those of progress.json: step and
tokens_per_second."""

_POLL_SECONDS = 0.5


def complete_lines(path: Path, offset: int = 0) -> tuple[list[str], int]:
    """Return the complete lines of a file from a byte offset on, and the offset after them.

    A last line without a newline is still being written, or was cut short by a kill. A file that does not exist has no
    lines; a file that has become shorter than the offset was rewritten and is read from its beginning.
    """
    if not path.exists():
        return [], offset
    if path.stat().st_size < offset:
        offset = 0
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    complete = content[: content.rfind(b"\n") + 1]
    return complete.decode().splitlines(), offset + len(complete)


def _read_progress(path: Path) -> JsonObject | None:
    """Return the content of progress.json; None if there is none yet."""
    try:
        fields: JsonObject = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return fields


@contextmanager
def followed(path: Path, on_event: OnEvent | None) -> Iterator[None]:
    """Call `on_event` from a thread with every line that is appended to `path` within the context, and every advance.

    An advance is a step of the run that has no line; only the last one is read at each poll.
    """
    if on_event is None:
        yield
        return
    stop = threading.Event()
    start = path.stat().st_size if path.exists() else 0
    progress = path.with_name(PROGRESS_FILE)
    progress.unlink(missing_ok=True)  # of an earlier attempt

    def follow() -> None:
        offset, last_step, is_last_round = start, 0, False
        while not is_last_round:
            is_last_round = stop.wait(_POLL_SECONDS)
            lines, offset = complete_lines(path, offset)
            for line in lines:
                event = json.loads(line)
                last_step = event["step"]
                on_event(event)
            advance = _read_progress(progress)
            if advance is not None and advance["step"] > last_step:
                last_step = advance["step"]
                on_event(advance)

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()
