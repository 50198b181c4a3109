"""Continuous batching of denoising: slots of one text each, one network call a tick for all of them, whatever block or step each is in.

No thread, no clock of its own, no HTTP: `submit`, `tick`, `cancel`. Texts join and leave between ticks. The random numbers of a text are a function of
its seed and number alone. Without fixed shapes, rounding in company may differ from rounding alone, and now and then decide a token.

A job that fails fails alone. A sampler's tick that raises leaves every text before or behind a step, never within one, so the engine repeats it:
once with all, in case the failure does not come again, then with halves, until each text whose tick raises is found. Those jobs end with a
failure; all others have taken their step, and go on with the same random numbers, so nothing is written twice and nothing that was said is
taken back. If afterwards the network does not even answer one token, no job is to blame (`NetworkLost`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlm_ray.config.errors import UserError
from dlm_ray.config.server import Engine as EngineSettings
from dlm_ray.diffusion.samplers.adjust import banned
from dlm_ray.diffusion.samplers.blocks import BlockSampler
from dlm_ray.diffusion.samplers.canvases import CanvasRequest, CanvasSampler
from dlm_ray.diffusion.samplers.requests import Request, SamplingParams, Stops
from dlm_ray.diffusion.samplers.rules import Confidence, SelectionRule
from dlm_ray.diffusion.schedules import Polynomial
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.generation.text_model import TextModel
from dlm_ray.serving.jobs import Job, SequenceUpdate, TextStream

log = logging.getLogger("dlm_ray.serving")


class NetworkLost(RuntimeError):
    """The network does not answer any more, whatever it is asked: the replica has to be replaced."""


@dataclass(eq=False)
class _Running:
    job: Job
    request: Any
    """Of the sampler."""
    sampler: Any
    stream: TextStream
    num_seen: tuple[int, int] = (-1, -1)
    """Final tokens and masked positions when the job was last told of."""


class Engine:
    """All texts that one replica denoises.

    Args:
        model: what denoises.
        settings: slots, shapes, sizes of blocks.

    Raises:
        UserError: if the checkpoint cannot be served, or this machine's arithmetic depends on the slot where fixed shapes are asked for.
    """

    def __init__(self, model: TextModel, settings: EngineSettings):
        if model.objective.canvas == "simplex":
            raise UserError(
                "this checkpoint is an SSD-LM, whose blocks are no slots of a batch: it cannot be served; sample it with dlm-ray sample"
            )
        self.model, self.settings = model, settings
        own = model.sampling_target()
        for size in settings.block_tokens:
            if own.kind == "autoregressive" or model.sequence_length % size or size == model.sequence_length:
                raise UserError(
                    f"engine.block_tokens={size}: this checkpoint is sampled by "
                    f"{'blocks of 1 token alone' if own.kind == 'autoregressive' else f'divisors of its context of {model.sequence_length}'}; change it"
                )
        self.block_sizes: tuple[int | None, ...] = tuple(dict.fromkeys((own.block_tokens, *settings.block_tokens)))
        """What requests may ask for, the trained size first; None is the whole canvas."""
        self.waiting: deque[Job] = deque()
        self.num_ticks = self.num_tokens = 0
        self._samplers = {size: self._sampler(size) for size in self.block_sizes}
        self._running: dict[int, _Running] = {}  # by id of the sampler's request
        if settings.batch_invariant:
            for each in self.block_sizes:
                self._check_fixed_shapes(each)

    @property
    def num_active(self) -> int:
        """Slots in use."""
        return len(self._running)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes jobs; each begins in the next tick that has a free slot."""
        for job in jobs:
            assert job.params.block_tokens in self._samplers, f"no slots for blocks of {job.params.block_tokens}"
            self.waiting.append(job)

    def cancel(self, jobs: Collection[Job]) -> None:
        """Gives the slots of jobs back at once; nothing more is said of them. A job that is finished already stays so."""
        self.waiting = deque(job for job in self.waiting if job not in jobs)
        for running in [one for one in self._running.values() if one.job in jobs]:
            self._remove(running)

    @torch.no_grad()
    def tick(self, now: float | None = None) -> list[SequenceUpdate]:
        """Lets jobs in, runs one denoising call for the slots of every size of blocks, and says what came of it.

        Args:
            now: what deadlines are compared with; `time.monotonic()`.

        Raises:
            NetworkLost: if a job has failed, and the network does not answer any more.
        """
        now = time.monotonic() if now is None else now
        updates = [self._expired(one) for one in list(self._running.values()) if _is_late(one.job, now)]
        updates += [SequenceUpdate(job, finish_reason="deadline") for job in self.waiting if _is_late(job, now)]
        self.waiting = deque(job for job in self.waiting if not _is_late(job, now))
        updates += self._admit()
        for sampler in self._samplers.values():
            if sampler.num_active:
                self.num_ticks += 1
                updates += self._step(sampler)
                updates += self._told(sampler)
        if any(update.failure is not None for update in updates):
            self._check_network()
        return updates

    def _admit(self) -> list[SequenceUpdate]:
        joining: dict[int | None, list[_Running]] = {}
        failed, num_free = [], self.settings.slots - len(self._running)
        while self.waiting and num_free:
            job = self.waiting.popleft()
            sampler = self._samplers[job.params.block_tokens]
            try:
                running = _Running(job, self._request(job), sampler, TextStream(self.model.tokenizer.decode, job.stops))
            except Exception as error:
                failed.append(SequenceUpdate(job, failure=error))
                continue
            joining.setdefault(job.params.block_tokens, []).append(running)
            num_free -= 1
        for size, group in joining.items():
            join = partial(self._join, self._samplers[size])
            failed += [SequenceUpdate(running.job, failure=error) for running, error in _culprits(join, group)]
        return failed

    def _join(self, sampler: Any, group: Sequence[_Running]) -> None:
        sampler.add([running.request for running in group])
        self._running |= {id(running.request): running for running in group}

    def _step(self, sampler: Any) -> list[SequenceUpdate]:
        """Run one tick of a sampler; return the failures of the texts for which it raises."""
        group = [running for running in self._running.values() if running.sampler is sampler]

        def tick(some: Sequence[_Running]) -> None:
            sampler.tick(None if some is group else {running.request for running in some})

        return [self._failed(running, error) for running, error in _culprits(tick, group)]

    def _failed(self, running: _Running, error: Exception) -> SequenceUpdate:
        self._remove(running)
        return SequenceUpdate(running.job, failure=error)

    def _check_network(self) -> None:
        """Raise NetworkLost if the network does not answer one token."""
        try:
            token = torch.zeros(1, 1, dtype=torch.int64, device=self.model.device)
            self.model.denoiser.hidden(token, Visibility(self.model.pattern)).cpu()
        except Exception as error:
            raise NetworkLost("the network does not answer any more") from error

    def _request(self, job: Job) -> Any:
        chosen, rule = job.params, self.model.rule(job.params)
        end_id = self.model.tokenizer_identity.end_id
        if chosen.block_tokens is None:
            never = self.model.forbidden_token_ids(bool(job.suffix), ())
            return CanvasRequest(
                job.prompt,
                job.length_tokens,
                job.suffix or (),
                rule,
                chosen.steps,
                chosen.grid,
                chosen.temperature,
                chosen.top_p,
                job.number,
                job.seed,
                banned(never) if never else None,
                None if job.suffix else end_id,
                job.stream_canvas,
            )
        assert isinstance(rule, SelectionRule), "other rules are refused by `choose`"
        params = SamplingParams(rule, chosen.steps, chosen.grid, chosen.temperature, chosen.top_p, job.stream_canvas)
        return Request(job.prompt, job.length_tokens, job.number, job.seed, Stops(end_id), params=params)

    def _told(self, sampler: Any) -> Iterator[SequenceUpdate]:
        for text, ids, is_masked, confidence in list(sampler.running()):
            running = self._running[id(text.request)]
            if not (running.job.is_streamed or running.job.stops):
                continue  # nobody looks at it before its end
            try:
                update = self._news(running, text, ids, is_masked, confidence)
            except Exception as error:
                yield self._failed(running, error)
                continue
            if update is not None:
                if update.finish_reason is not None:
                    self._remove(running)
                yield update
        finished = list(sampler.finished)
        sampler.finished.clear()
        for text in finished:
            running = self._running.pop(id(text.request))
            try:
                final = self._cut(text.ids)
                new = running.stream.push(final, is_last=True)
                is_stop = running.stream.is_stopped or text.stopped_by == "end"
                yield self._update(running, text, new, len(final), "stop" if is_stop else "length")
            except Exception as error:
                yield SequenceUpdate(running.job, failure=error)

    def _news(
        self, running: _Running, text: Any, ids: Tensor, is_masked: Tensor, confidence: Tensor
    ) -> SequenceUpdate | None:
        """What is to be said of a text under way, if anything; with a reason to finish if it has written a stop text."""
        final = self._final(text)
        seen = (len(final), int(is_masked.sum()) if running.job.stream_canvas else 0)
        if seen == running.num_seen:
            return None
        running.num_seen = seen
        new = running.stream.push(final, is_last=False)
        if running.stream.is_stopped:
            return self._update(running, text, new, len(final), "stop")
        if not (running.job.is_streamed and (new or running.job.stream_canvas)):
            return None
        canvas = self._canvas(running.job, text, ids, is_masked, confidence) if running.job.stream_canvas else None
        return self._update(running, text, new, len(final), None, canvas)

    def _update(
        self, running: _Running, text: Any, new: str, num_tokens: int, reason: Any, canvas: Any = None
    ) -> SequenceUpdate:
        if reason is not None:
            self.num_tokens += num_tokens
            new = new if running.job.is_streamed else running.stream.sent
        found = max(0, text.num_cached_tokens - 1)  # without the start token, which nobody sent
        return SequenceUpdate(
            running.job, new, canvas, reason, num_tokens, text.num_denoising_calls, text.num_cache_calls, found
        )

    def _final(self, text: Any) -> list[int]:
        """Ids of a text under way that stay, without its prompt."""
        if isinstance(text.request, CanvasRequest):
            return self._cut(text.ids)
        start = len(text.request.prompt)
        return self._cut(text.ids[start : start + text.request.length_tokens])

    def _cut(self, ids: list[int]) -> list[int]:
        end_id = self.model.tokenizer_identity.end_id
        return ids[: ids.index(end_id)] if end_id in ids else ids

    def _canvas(self, job: Job, text: Any, ids: Any, is_masked: Any, confidence: Any) -> dict[str, Any]:
        """The block that a text is at, or the whole of what it writes; the prompt's part of a block is left out."""
        start, given = 0, 0
        if job.params.block_tokens is not None:
            start = max(0, text.num_encoded - len(job.prompt))
            given = max(0, len(job.prompt) - text.num_encoded)
        own = zip(ids.tolist()[given:], is_masked.tolist()[given:], confidence.exp().tolist()[given:], strict=True)
        tokens = [
            [None, 0.0] if masked else [self.model.tokenizer.decode([token]), round(p, 3)] for token, masked, p in own
        ]
        return {"start": start, "tokens": tokens[: job.length_tokens - start]}

    def _expired(self, running: _Running) -> SequenceUpdate:
        text = next(text for text, *_ in running.sampler.running() if text.request is running.request)
        self._remove(running)
        return self._update(running, text, "", len(self._final(text)), "deadline")

    def _remove(self, running: _Running) -> None:
        del self._running[id(running.request)]
        running.sampler.remove(running.request)

    def _sampler(self, size: int | None) -> Any:
        model, settings = self.model, self.settings
        common: dict[str, Any] = {"num_slots": settings.slots, "fixed_shapes": settings.batch_invariant}
        if size is None:
            return CanvasSampler(
                model.denoiser, model.pattern, capacity_tokens=model.sequence_length, device=model.device, **common
            )
        never = model.forbidden_token_ids(False, ())
        return BlockSampler(
            model.denoiser,
            Confidence(Polynomial()),  # each request brings its own
            block_tokens=size,
            capacity_tokens=model.sequence_length // size * size,
            num_steps=size,
            adjust=banned(never) if never else None,
            prefix_bytes=settings.prefix_cache_mib * 2**20,
            **common,
        )

    @torch.no_grad()
    def _check_fixed_shapes(self, size: int | None) -> None:
        """The same text in every slot, and beside other neighbours, has to give the same bits, in hidden rows and in logits."""
        model, slots = self.model, self.settings.slots
        width = model.sequence_length if size is None else size
        text = torch.arange(width, device=model.device) % model.denoiser.vocab_size

        def bits(ids: Tensor, lengths: list[int]) -> Tensor:
            if size is None:
                return model.denoiser.hidden(ids, Visibility(model.pattern, document_ids=torch.zeros_like(ids)))
            cache = model.denoiser.new_cache(slots, width * 2, fixed_shapes=True)
            cache.lengths = lengths
            hidden = model.denoiser.hidden(ids, Visibility("bidirectional", block_tokens=size), cache)
            return model.denoiser.reduce_logits(hidden.flatten(0, 1), _fingerprint).view(slots, width, -1)

        everywhere = bits(text.repeat(slots, 1), [0] * slots)
        wrong = [slot for slot in range(slots) if not torch.equal(everywhere[slot], everywhere[0])]
        for slot in {0, slots // 2, slots - 1}:
            ids = torch.zeros(slots, width, dtype=torch.int64, device=model.device)
            ids[slot] = text
            alone = bits(ids, [0 if number == slot else width * (number % 2) for number in range(slots)])
            wrong += [slot] if not torch.equal(alone[slot], everywhere[0]) else []
        if wrong:
            raise UserError(
                f"engine.batch_invariant=true: on this machine the same text in slot {wrong[0]} of {slots} has other bits than in slot 0; change "
                "engine.slots (multiples of 16 are the likeliest), or set engine.batch_invariant=false"
            )


def _fingerprint(logits: Tensor) -> Tensor:
    """[n, V] -> [n, 3]."""
    weights = torch.arange(1, logits.shape[1] + 1, device=logits.device).double()
    return torch.stack([logits.double().sum(-1), logits.double() @ weights, logits.amax(-1).double()], 1)


def _culprits(act: Callable[[Sequence[_Running]], None], group: Sequence[_Running]) -> list[tuple[_Running, Exception]]:
    """Do something for a group of texts, so that it is done for all but those for which it raises; return those.

    `act` may raise when it is done for some of a group; then it is done once more for all, in case it does not raise again, and then for halves.
    """
    try:
        act(group)
        return []
    except Exception as error:
        log.warning(
            "a step of %d texts failed, and is repeated to find whose failure it is", len(group), exc_info=error
        )
        _free_memory(error)
    return _by_halves(act, list(group))


def _by_halves(
    act: Callable[[Sequence[_Running]], None], group: Sequence[_Running]
) -> list[tuple[_Running, Exception]]:
    try:
        act(group)
        return []
    except Exception as error:
        _free_memory(error)
        if len(group) == 1:
            return [(group[0], error)]
    middle = len(group) // 2
    return [*_by_halves(act, group[:middle]), *_by_halves(act, group[middle:])]


def _free_memory(error: Exception) -> None:
    """Let go of memory that is kept and not used, if it ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()


def _is_late(job: Job, now: float) -> bool:
    return job.deadline is not None and now >= job.deadline
