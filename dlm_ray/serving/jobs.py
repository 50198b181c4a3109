"""Input and output of the engine: a job is one text to generate; an update is its progress in a tick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dlm_ray.config.sampling import ResolvedSampling
from dlm_ray.serving.messages import CanvasTokens, FinishReason


@dataclass(frozen=True, eq=False)
class Job:
    """One text to generate."""

    request_id: str
    """Id of the request."""
    prompt: list[int]
    """Ids, the start token first."""
    length_tokens: int
    """Tokens to generate."""
    params: ResolvedSampling
    """The options of sampling."""
    suffix: list[int] | None = None
    """Ids after the generated text; None if there are none."""
    seed: int = 0
    """Seed of the request."""
    number: int = 0
    """Index of the text in its request; with the seed it determines the random numbers."""
    stops: tuple[str, ...] = ()
    """Stop texts: the text ends before the first of them."""
    stream_canvas: bool = False
    """Whether updates have the canvas while it is denoised."""
    deadline: float | None = None
    """Time, on the clock `time.monotonic`, at which the job ends; None for no deadline."""
    is_streamed: bool = True
    """Whether updates have the characters as they become final; otherwise the last update has all of them."""


@dataclass(frozen=True)
class SequenceUpdate:
    """The progress of a job in one tick."""

    job: Job
    """The job."""
    text: str = ""
    """Characters that became final in this tick; for a job that is not streamed, all characters, in its last update."""
    canvas: CanvasTokens | None = None
    """The canvas while it is denoised; None for a job whose canvas is not streamed."""
    finish_reason: FinishReason | None = None
    """Why the job ended; None while it runs."""
    num_tokens: int = 0
    """Tokens generated so far."""
    num_denoising_calls: int = 0
    """Network calls that denoised this text."""
    num_cache_calls: int = 0
    """Network calls that only filled its KV cache."""
    num_cached_tokens: int = 0
    """Tokens of the prompt that were in the prefix cache."""
    failure: Exception | None = None
    """Why the job cannot continue; this is its last update. Other jobs are not affected."""


@dataclass
class TextStream:
    """Decodes final ids to characters that never change afterwards.

    It holds back a character with incomplete bytes, and characters that may begin a stop text.
    """

    decode: Callable[[list[int]], str]
    """Ids -> text."""
    stops: tuple[str, ...]
    """Stop texts."""
    sent: str = ""
    """Characters returned so far."""
    is_stopped: bool = False
    """Whether a stop text was found."""
    _ids: list[int] = field(default_factory=list)

    def push(self, ids: list[int], is_last: bool) -> str:
        """Return the new characters.

        Args:
            ids: all final ids so far.
            is_last: whether the text ends here, so that nothing is held back.
        """
        if self.is_stopped or (ids == self._ids and not is_last):
            return ""
        self._ids = ids
        text = self.decode(ids)
        if not is_last:  # the replacement character stands for incomplete bytes
            text = text.rstrip("\ufffd")
        starts = [start for stop in self.stops if (start := text.find(stop)) >= 0]
        if starts:
            self.is_stopped = True
            text = text[: min(starts)]
        elif not is_last:
            held_back = max((_overlap(text, stop) for stop in self.stops), default=0)
            text = text[: len(text) - held_back]
        new = text[len(self.sent) :]
        self.sent += new
        return new


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
