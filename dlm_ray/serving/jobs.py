"""What the engine is asked for and what it says while it works: a job is one text, an update is what became of it in a tick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from dlm_ray.generation.sampling import ResolvedSampling

FinishReason = Literal["length", "stop", "deadline", "cancelled"]


class Task(TypedDict):
    """A request for text, in plain values that cross a border between processes."""

    request_id: str
    model: str
    prompts: list[Any]
    """Texts, or lists of ids."""
    messages: list[dict[str, str]] | None
    """Instead of prompts."""
    suffix: str | None
    lengths: list[int]
    """Tokens to write: of every prompt, texts of each of these lengths; none for the usual one."""
    length_field: str
    """What requests call it."""
    n: int
    seed: int | None
    stops: list[str]
    options: dict[str, Any]
    """`SamplingOptions` that were named."""
    is_streamed: bool
    """Whether somebody reads a text before it is finished."""
    stream_canvas: bool
    timeout_seconds: float | None


@dataclass(frozen=True, eq=False)
class Job:
    """One text that somebody waits for."""

    request_id: str
    prompt: list[int]
    """Ids, the start token first."""
    length_tokens: int
    chosen: ResolvedSampling
    """How it is denoised."""
    suffix: list[int] | None = None
    """Ids behind what is to be written; None if nothing stands there."""
    seed: int = 0
    number: int = 0
    """Which of the request's texts; with the seed it decides the random numbers."""
    stops: tuple[str, ...] = ()
    """The text ends before the first of these."""
    stream_canvas: bool = False
    """Whether the canvas is wanted while it is denoised."""
    deadline: float | None = None
    """By `time.monotonic`."""
    is_streamed: bool = True
    """Whether its characters are wanted as they become final; otherwise all at the end."""


@dataclass(frozen=True)
class SequenceUpdate:
    """What a tick did for a job."""

    job: Job
    text: str = ""
    """Characters that are final now and were not before; of a job that is not streamed all of them, at its end."""
    canvas: dict[str, Any] | None = None
    """`start`, the number of final tokens in front, and `tokens`: of every position the text (None while masked) and the probability."""
    finish_reason: FinishReason | None = None
    num_tokens: int = 0
    """Written so far."""
    num_denoising_calls: int = 0
    num_cache_calls: int = 0
    num_cached_tokens: int = 0
    """Of the prompt, in the prefix cache."""
    failure: Exception | None = None
    """Why the job cannot go on; nothing more is said of it. It failed alone: no other job is touched."""


@dataclass
class TextStream:
    """Ids that become final, as characters that never have to be taken back.

    A character whose bytes are not complete is held back, and so is what may be the beginning of a stop text.
    """

    decode: Any
    stops: tuple[str, ...]
    sent: str = ""
    is_stopped: bool = False
    _ids: list[int] = field(default_factory=list)

    def push(self, ids: list[int], is_last: bool) -> str:
        """All ids so far -> the characters that are new."""
        if self.is_stopped or (ids == self._ids and not is_last):
            return ""
        self._ids = ids
        whole = self.decode(ids)
        if not is_last:  # a character whose bytes are not complete is no character yet
            whole = whole.rstrip("\ufffd")
        found = [place for stop in self.stops if (place := whole.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            whole = whole[: min(found)]
        elif not is_last:
            held = max((_overlap(whole, stop) for stop in self.stops), default=0)
            whole = whole[: len(whole) - held]
        new = whole[len(self.sent) :]
        self.sent += new
        return new


def _overlap(text: str, stop: str) -> int:
    """How many characters of the text's end are the beginning of the stop."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
