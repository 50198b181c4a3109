"""The progress of one training run: one live line on a terminal, plain lines or JSON lines in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from rich.markup import escape
from rich.status import Status

from dlm_ray.cli.console import console, duration, is_json_log, is_live, print_event, print_message, seconds_left

_FIRST_LINES_SECONDS = 10.0
_LATER_LINES_SECONDS = 60.0
_MANY_LINES_AFTER_SECONDS = 600.0


@dataclass
class RunStatus:
    """The state of a run as its metrics tell it; what is unknown yet is None."""

    run: str
    steps: int
    """Steps of the whole run."""
    stage: str = "starting"
    step: int = 0
    loss: float | None = None
    bits_per_byte: float | None = None
    """Of the held-out sequences, at the last validation: a bound for diffusion objectives."""
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    checkpoint: str | None = None

    def update(self, event: Mapping[str, Any]) -> str:
        """Take over one event of `fit`, and return its kind: progress, validation, clip_search or checkpoint."""
        self.step = event["step"]
        self.loss = event.get("loss", self.loss)
        self.tokens_per_second = event.get("tokens_per_second") or self.tokens_per_second
        if "annealing_ratio" in event:
            self.stage = _stage(event)
        elif self.stage.startswith("starting"):
            self.stage = "training"
        self.bits_per_byte = event.get("validation", {}).get("bits_per_byte", self.bits_per_byte)
        self.checkpoint = event.get("checkpoint") or self.checkpoint
        return next((kind for kind in ("validation", "clip_search", "checkpoint") if kind in event), "progress")

    def line(self) -> str:
        """Return the state on one line."""
        if self.step == 0:
            return f"{self.run}: {self.stage}"
        parts = [f"{self.run}: {self.stage}, step {self.step} of {self.steps}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.bits_per_byte is not None:
            parts.append(f"held-out {self.bits_per_byte:.3f} bits/byte")
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.seconds_left is not None:
            parts.append(f"{duration(self.seconds_left)} left")
        if self.checkpoint is not None:
            parts.append(f"saved {PurePosixPath(self.checkpoint).name}")
        return ", ".join(parts)


class RunLines:
    """Prints the status of a run: at each event, and at least every 10 seconds (every minute after 10 minutes).

    Args:
        status: of the run.
        show: called with (kind of event, status) for each line.
        clock: seconds.
    """

    def __init__(
        self,
        status: RunStatus,
        show: Callable[[str, RunStatus], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.status = status
        self._show, self._clock = show, clock
        self._started = self._printed_at = clock()
        self._first: tuple[float, int] | None = None
        self._lock = threading.Lock()

    def begin(self, run_dir: str) -> None:
        """Print the run directory, and that the workers start."""
        with self._lock:
            self.status.stage = "starting workers"
            print_message(f"run directory: {run_dir}")
            self._print("start")

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Take over an event, and print a line for it or if one is due."""
        with self._lock:
            is_first, now = self._first is None, self._clock()
            kind = self.status.update(event)
            first_time, first_step = self._first = self._first or (now, self.status.step)
            self.status.seconds_left = seconds_left(
                now - first_time, self.status.step - first_step, self.status.steps - self.status.step
            )
            if is_first or kind != "progress":
                self._print(kind)
            else:
                self._print_if_due(now)

    def tick(self) -> None:
        """Print a line if one is due; called regularly, so that a log is never silent for long."""
        with self._lock:
            self._print_if_due(self._clock())

    def _print_if_due(self, now: float) -> None:
        many = now - self._started > _MANY_LINES_AFTER_SECONDS
        if now - self._printed_at >= (_LATER_LINES_SECONDS if many else _FIRST_LINES_SECONDS):
            self._print("progress")

    def _print(self, kind: str) -> None:
        self._printed_at = self._clock()
        self._show(kind, self.status)


@contextmanager
def run_display(run: str, steps: int) -> Iterator[RunLines]:
    """Show the progress of a run on stderr; give `begin` and `on_event` of the value to `fit`."""
    status = RunStatus(run, steps)
    if is_live():
        with console.status(escape(status.line())) as live:
            yield _LiveLine(status, live)
        return
    lines = RunLines(status, _print_json if is_json_log() else _print_line)
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(1.0):
            lines.tick()

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield lines
    finally:
        stop.set()
        ticker.join()


class _LiveLine(RunLines):
    """Shows the status in one line of the terminal, which every event rewrites."""

    def __init__(self, status: RunStatus, live: Status):
        super().__init__(status, lambda _, status: live.update(escape(status.line())))

    def _print_if_due(self, now: float) -> None:
        self._print("progress")


def _stage(event: Mapping[str, Any]) -> str:
    """Return what a step of a curriculum trains: the block size, and how far annealing is."""
    ratio, block_tokens = event["annealing_ratio"], event.get("block_tokens")
    parts = [f"blocks of {block_tokens}" if block_tokens else "", f"annealing {ratio:.0%}" if 0 < ratio < 1 else ""]
    return " ".join(part for part in parts if part) or "training"


def _print_line(kind: str, status: RunStatus) -> None:
    print_message(status.line())


def _print_json(kind: str, status: RunStatus) -> None:
    print_event(kind, **asdict(status))
