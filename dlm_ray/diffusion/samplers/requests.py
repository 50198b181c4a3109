"""Requests for block sampling: prompt, stop conditions, candidates, and the state and output of each request."""

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
# A candidate's number is stored in the bits above those of any request number.
_CANDIDATE_BIT = 32

StoppedBy = Literal["length", "end", "entropy"]


@dataclass(frozen=True)
class Stops:
    """Conditions that end a sequence before its length (BD3-LM, section 6.2, and its code).

    Both look at this sequence only, and both are off by default.
    """

    end_id: int | None = None
    """Stop after the first generated token with this id, which is kept; None turns the condition off."""
    lowest_entropy_nats: float | None = None
    """Stop when the unigram entropy of the last 256 generated tokens is below this value in nats (4.0 in the paper).

    Those 256 tokens are dropped. None turns the condition off.
    """


@dataclass(frozen=True)
class SamplingParams:
    """How a sequence is denoised; sequences with different parameters share network calls."""

    rule: SelectionRule
    """Selects the positions that a step reveals."""
    num_steps: int
    """T, the steps of a block, for rules with times."""
    grid: str = "uniform"
    """Spacing of the times, `uniform` or `cosine`, as in `whole_canvas.sample`."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_p: float = 1.0
    """Probability of the nucleus that tokens are sampled from; 1 keeps all tokens."""
    stream_canvas: bool = False
    """Whether to compute the model's log-probability of every token, for display."""


@dataclass(frozen=True, eq=False)
class Request:
    """A request for one sequence."""

    prompt: Sequence[int]
    """Token ids, the start token first."""
    length_tokens: int
    """Maximum number of tokens to generate."""
    number: int = 0
    """Determines the random numbers, together with the seed; other requests and slots have no influence."""
    seed: int = 0
    stops: Stops = Stops()
    candidates: int = 1
    """Number of candidates for every block, each in its own slot; one of them is kept."""
    reward: Callable[[list[int]], float] | None = None
    """Returns the reward of a candidate, given the ids from prompt to block end; None keeps the first candidate."""
    reward_temperature: float = 1.0
    """A candidate is kept with probability softmax(reward / temperature); 0 keeps the best."""
    params: SamplingParams | None = None
    """The sampling parameters; None takes the sampler's."""

    def random(self, block: int, candidate: int) -> np.random.Generator:
        """Return the generator of a block's random numbers; blocks are counted from the start of the sequence."""
        return generator(self.seed, SAMPLING, block, self.number + (candidate << _CANDIDATE_BIT))

    def choose(self, block: int, candidates: Sequence[list[int]]) -> int:
        """Return the index of the candidate to keep."""
        if len(candidates) == 1 or self.reward is None:
            return 0
        rewards = np.array([self.reward(ids) for ids in candidates], dtype=np.float64)
        if self.reward_temperature == 0:
            return int(rewards.argmax())
        odds = np.exp((rewards - rewards.max()) / self.reward_temperature).cumsum()
        uniform = self.random(block, len(candidates)).random()
        return int(np.searchsorted(odds, uniform * odds[-1], side="right").clip(max=len(candidates) - 1))


@dataclass(frozen=True)
class GenerationOutput:
    """The output of a finished request."""

    request: Request
    ids: list[int]
    """Generated token ids, without the prompt."""
    stopped_by: StoppedBy
    num_denoising_calls: int
    """Network calls that denoised at least one of its blocks."""
    num_cache_calls: int
    """Network calls that only filled the cache: with its prompt, its finished blocks, and context encoded again."""
    num_cached_tokens: int = 0
    """Prompt tokens, the start token included, that were in the cache already."""


@dataclass(eq=False)
class SequenceState:
    """The state of a running request."""

    request: Request
    ids: list[int]
    """Token ids of the prompt and of the finished blocks."""
    block_start: int = 0
    """Position at which the current block begins; the ids before it are in the cache, or about to be written to it."""
    num_denoising_calls: int = 0
    num_cache_calls: int = 0
    num_cached_tokens: int = 0
    stopped_by: StoppedBy | None = None
    num_dropped: int = field(default=0)
    """Number of tokens dropped from the end of a finished sequence."""

    def append(self, ids: Sequence[int]) -> None:
        """Append the generated part of a finished block, and set `stopped_by` if the sequence ends with it."""
        first = len(self.ids)
        self.ids.extend(ids)
        end = len(self.request.prompt) + self.request.length_tokens
        stops = self.request.stops
        new_ids = self.ids[first:end]
        if stops.end_id is not None and stops.end_id in new_ids:
            self._finish("end", len(self.ids) - first - new_ids.index(stops.end_id) - 1)
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

    def _finish(self, stopped_by: StoppedBy, num_dropped: int) -> None:
        self.stopped_by, self.num_dropped = stopped_by, num_dropped

    def output(self) -> GenerationOutput:
        """Return the output of the finished request."""
        assert self.stopped_by is not None, "the request is finished"
        ids = self.ids[len(self.request.prompt) : len(self.ids) - self.num_dropped]
        return GenerationOutput(
            self.request, ids, self.stopped_by, self.num_denoising_calls, self.num_cache_calls, self.num_cached_tokens
        )


def unigram_entropy_nats(ids: Sequence[int]) -> float:
    """Return the entropy, in nats, of the token frequencies of a sequence."""
    counts = np.unique(np.asarray(ids), return_counts=True)[1]
    return math.log(len(ids)) - float((counts * np.log(counts)).sum()) / len(ids)
