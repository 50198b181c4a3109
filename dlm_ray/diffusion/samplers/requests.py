"""A text that is asked for, block by block: what it starts from, when it stops, how its candidates are weighed, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from dlm_ray.diffusion.draws import SAMPLING, generator
from dlm_ray.diffusion.samplers.rules import SelectionRule

ENTROPY_WINDOW_TOKENS = 256
LOWEST_ENTROPY_NATS = 4.0
# Numbers of candidates are above those of any row.
_CANDIDATE_BIT = 32

StoppedBy = Literal["length", "end", "entropy"]


@dataclass(frozen=True)
class Stops:
    """When a text ends before its length (BD3-LM, section 6.2, and its code): both rules look at this text alone, and are off by default."""

    end_id: int | None = None
    """After the first generated token that is this one, which is kept."""
    lowest_entropy_nats: float | None = None
    """When the unigram entropy of the last 256 generated tokens is below (4.0 in the paper); those 256 are dropped."""


@dataclass(frozen=True)
class SamplingParams:
    """How a text is denoised; texts of different ways share network calls."""

    rule: SelectionRule
    """What a step reveals."""
    num_steps: int
    """T of a block, for rules with times."""
    grid: str = "uniform"
    """As in `whole_canvas.sample`."""
    temperature: float = 1.0
    top_p: float = 1.0
    stream_canvas: bool = False
    """Whether the model's probability of every token is wanted, for people to see."""


@dataclass(frozen=True, eq=False)
class Request:
    """One text."""

    prompt: Sequence[int]
    """Ids, the start token first."""
    length_tokens: int
    """To write at most."""
    number: int = 0
    """With the seed it decides the random numbers; neighbours and slots do not."""
    seed: int = 0
    stops: Stops = Stops()
    candidates: int = 1
    """So many of every block, in as many slots; one of them is kept."""
    reward: Callable[[list[int]], float] | None = None
    """Of the ids of prompt and text up to and with the block."""
    reward_temperature: float = 1.0
    """A candidate is kept with probability softmax(reward / temperature); 0 keeps the best."""
    params: SamplingParams | None = None
    """The sampler's own if not said."""

    def random(self, block: int, candidate: int) -> np.random.Generator:
        """The numbers of a block's steps, one after the other; a block counts from the start of the text, wherever its keys lie."""
        return generator(self.seed, SAMPLING, block, self.number + (candidate << _CANDIDATE_BIT))

    def choose(self, block: int, texts: Sequence[list[int]]) -> int:
        """Which of the candidates stays."""
        if len(texts) == 1 or self.reward is None:
            return 0
        rewards = np.array([self.reward(text) for text in texts], dtype=np.float64)
        if self.reward_temperature == 0:
            return int(rewards.argmax())
        odds = np.exp((rewards - rewards.max()) / self.reward_temperature).cumsum()
        uniform = self.random(block, len(texts)).random()
        return int(np.searchsorted(odds, uniform * odds[-1], side="right").clip(max=len(texts) - 1))


@dataclass(frozen=True)
class GenerationOutput:
    """A finished request."""

    request: Request
    ids: list[int]
    """What was written, without the prompt."""
    stopped_by: StoppedBy
    num_denoising_calls: int
    """Network calls in which at least one of its blocks was denoised."""
    num_cache_calls: int
    """Others that it took part in: its prompt, its finished blocks, and what was encoded again beyond the context."""
    num_cached_tokens: int = 0
    """Of its prompt, the start token included, that was in the cache already."""


@dataclass(eq=False)
class SequenceState:
    """A request under way."""

    request: Request
    ids: list[int]
    """Prompt and text."""
    num_encoded: int = 0
    """Ids whose keys are or were in the cache; the current block begins behind them."""
    num_denoising_calls: int = 0
    num_cache_calls: int = 0
    num_cached_tokens: int = 0
    stopped_by: StoppedBy | None = None
    num_dropped: int = field(default=0)
    """Of the end of the text, when it is finished."""

    def take(self, ids: Sequence[int]) -> None:
        """Adds a finished block, or what the prompt did not give of it, and says whether the text ends with it."""
        first = len(self.ids)
        self.ids.extend(ids)
        end = len(self.request.prompt) + self.request.length_tokens
        stops = self.request.stops
        written = self.ids[first:end]
        if stops.end_id is not None and stops.end_id in written:
            self._finish("end", len(self.ids) - first - written.index(stops.end_id) - 1)
            return
        if (
            stops.lowest_entropy_nats is not None
            and min(len(self.ids), end) - len(self.request.prompt) >= ENTROPY_WINDOW_TOKENS
        ):
            window = self.ids[:end][-ENTROPY_WINDOW_TOKENS:]
            if unigram_entropy_nats(window) < stops.lowest_entropy_nats:
                self._finish("entropy", max(0, len(self.ids) - end) + ENTROPY_WINDOW_TOKENS)
                return
        if len(self.ids) >= end:
            self._finish("length", len(self.ids) - end)

    def _finish(self, why: StoppedBy, num_dropped: int) -> None:
        self.stopped_by, self.num_dropped = why, num_dropped

    def written(self) -> GenerationOutput:
        """The result."""
        assert self.stopped_by is not None, "the request is finished"
        ids = self.ids[len(self.request.prompt) : len(self.ids) - self.num_dropped]
        return GenerationOutput(
            self.request, ids, self.stopped_by, self.num_denoising_calls, self.num_cache_calls, self.num_cached_tokens
        )


def unigram_entropy_nats(ids: Sequence[int]) -> float:
    """Entropy of the frequencies of tokens in a text."""
    counts = np.unique(np.asarray(ids), return_counts=True)[1]
    return math.log(len(ids)) - float((counts * np.log(counts)).sum()) / len(ids)
