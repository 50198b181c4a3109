"""Continuous batching of denoising: every slot holds one sequence, and one network call per tick advances all slots.

The engine has no thread, no clock and no HTTP: callers use `submit`, `tick` and `cancel`. Sequences join and leave
between ticks. The random numbers of a sequence depend only on its seed and number. Without fixed shapes, rounding
depends on the batch, and may in rare cases change a token.

A job that fails does not affect other jobs (`recovery`): the engine repeats the step of the others, which keep their
random numbers, so no text is generated twice and no streamed text is taken back. If the network afterwards fails even
for one token, no job is the cause, and `tick` raises `NetworkLost`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlm_ray.config.errors import UserError
from dlm_ray.config.server import EngineSettings
from dlm_ray.diffusion.objectives.block import is_context_causal
from dlm_ray.diffusion.samplers.adjust import banned
from dlm_ray.diffusion.samplers.blocks import BlockSampler
from dlm_ray.diffusion.samplers.canvases import CanvasRequest, CanvasSampler, CanvasState
from dlm_ray.diffusion.samplers.requests import Request, SamplingParams, SequenceState, Stops
from dlm_ray.diffusion.samplers.rules import Confidence, SelectionRule
from dlm_ray.diffusion.schedules import Polynomial
from dlm_ray.generation.text_model import TextModel
from dlm_ray.serving.invariance import check_batch_invariance
from dlm_ray.serving.jobs import Job, SequenceUpdate, TextStream
from dlm_ray.serving.messages import CanvasTokens, FinishReason
from dlm_ray.serving.recovery import NetworkLost, check_network, isolate_failures
from dlm_ray.serving.slots import FinishedSequence, RunningSequence, SlotRequest, SlotSampler

__all__ = ["Engine", "NetworkLost"]


@dataclass(eq=False)
class _RunningJob:
    job: Job
    request: SlotRequest
    """The job as the sampler's request."""
    sampler: SlotSampler[Any]
    stream: TextStream
    num_seen: tuple[int, int] = (-1, -1)
    """Number of final tokens and of masked positions at the job's last update."""


class Engine:
    """All sequences that one replica denoises.

    Args:
        model: the model.
        settings: number of slots, fixed shapes, block sizes and the size of the prefix cache.

    Raises:
        UserError: if the checkpoint cannot be served, or if `engine.batch_invariant` is set and this machine's numbers
            depend on the slot.
    """

    def __init__(self, model: TextModel, settings: EngineSettings):
        if model.objective.canvas == "simplex":
            raise UserError(
                "this checkpoint is an SSD-LM, whose blocks cannot share a batch: it cannot be served; sample it with "
                "dlm-ray sample"
            )
        self.model, self.settings = model, settings
        self.block_sizes = _block_sizes(model, settings)
        """Block sizes that requests may choose, the trained size first; None is the whole canvas."""
        self.waiting: deque[Job] = deque()
        self.num_ticks = self.num_tokens = 0
        self._samplers = {size: self._sampler(size) for size in self.block_sizes}
        self._running: dict[int, _RunningJob] = {}  # by id() of the sampler's request
        if settings.batch_invariant:
            for size in self.block_sizes:
                check_batch_invariance(model, settings.slots, size)

    @property
    def num_active(self) -> int:
        """Return the number of slots in use."""
        return len(self._running)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs; each starts in the next tick that has a free slot."""
        for job in jobs:
            assert job.params.block_tokens in self._samplers, f"no slots for blocks of {job.params.block_tokens}"
            self.waiting.append(job)

    def cancel(self, jobs: Collection[Job]) -> None:
        """Free the slots of jobs at once, without further updates; finished jobs are ignored."""
        self.waiting = deque(job for job in self.waiting if job not in jobs)
        for running in [running for running in self._running.values() if running.job in jobs]:
            self._remove(running)

    @torch.no_grad()
    def tick(self, now: float | None = None) -> list[SequenceUpdate]:
        """Start waiting jobs, run one denoising call for the slots of each block size, and return the updates.

        Args:
            now: time to compare deadlines with; `time.monotonic()` by default.

        Raises:
            NetworkLost: if a job has failed and the network fails for every input.
        """
        now = time.monotonic() if now is None else now
        updates = [self._expired(running) for running in list(self._running.values()) if _is_late(running.job, now)]
        updates += [SequenceUpdate(job, finish_reason="deadline") for job in self.waiting if _is_late(job, now)]
        self.waiting = deque(job for job in self.waiting if not _is_late(job, now))
        updates += self._admit()
        for sampler in self._samplers.values():
            if sampler.num_active:
                self.num_ticks += 1
                updates += self._step(sampler)
                updates += self._running_updates(sampler)
                updates += self._finished_updates(sampler)
        if any(update.failure is not None for update in updates):
            check_network(self.model)
        return updates

    def _admit(self) -> list[SequenceUpdate]:
        """Start waiting jobs in the free slots; return the failures."""
        joining: dict[int | None, list[_RunningJob]] = {}
        failed, num_free = [], self.settings.slots - len(self._running)
        while self.waiting and num_free:
            job = self.waiting.popleft()
            sampler = self._samplers[job.params.block_tokens]
            try:
                stream = TextStream(self.model.decode, job.stops)
                running = _RunningJob(job, self._request(job), sampler, stream)
            except Exception as error:
                failed.append(SequenceUpdate(job, failure=error))
                continue
            joining.setdefault(job.params.block_tokens, []).append(running)
            num_free -= 1
        for size, group in joining.items():
            join = partial(self._join, self._samplers[size])
            failed += [SequenceUpdate(running.job, failure=error) for running, error in isolate_failures(join, group)]
        return failed

    def _join(self, sampler: SlotSampler[Any], group: Sequence[_RunningJob]) -> None:
        sampler.add([running.request for running in group])
        self._running |= {id(running.request): running for running in group}

    def _step(self, sampler: SlotSampler[Any]) -> list[SequenceUpdate]:
        """Run one tick of a sampler; return the failures of the jobs for which it raises."""
        group = [running for running in self._running.values() if running.sampler is sampler]

        def tick(members: Sequence[_RunningJob]) -> None:
            sampler.tick(None if members is group else {running.request for running in members})

        return [self._failed(running, error) for running, error in isolate_failures(tick, group)]

    def _failed(self, running: _RunningJob, error: Exception) -> SequenceUpdate:
        self._remove(running)
        return SequenceUpdate(running.job, failure=error)

    def _request(self, job: Job) -> SlotRequest:
        """Return the sampler's request for a job."""
        options, rule = job.params, self.model.rule(job.params)
        end_id = self.model.tokenizer_identity.end_id
        if options.block_tokens is None:
            forbidden = self.model.forbidden_token_ids(bool(job.suffix), ())
            return CanvasRequest(
                job.prompt,
                job.length_tokens,
                job.suffix or (),
                rule,
                options.steps,
                options.grid,
                options.temperature,
                options.top_p,
                job.number,
                job.seed,
                banned(forbidden) if forbidden else None,
                None if job.suffix else end_id,
                job.stream_canvas,
            )
        assert isinstance(rule, SelectionRule), "`resolve_sampling` refuses other rules"
        params = SamplingParams(
            rule, options.steps, options.grid, options.temperature, options.top_p, job.stream_canvas
        )
        return Request(job.prompt, job.length_tokens, job.number, job.seed, Stops(end_id), params=params)

    def _running_updates(self, sampler: SlotSampler[Any]) -> Iterator[SequenceUpdate]:
        """Yield the updates of running jobs that are streamed or have stop texts."""
        for sequence, ids, is_masked, confidence in list(sampler.running()):
            running = self._running[id(sequence.request)]
            if not (running.job.is_streamed or running.job.stops):
                continue
            try:
                update = self._running_update(running, sequence, ids, is_masked, confidence)
            except Exception as error:
                yield self._failed(running, error)
                continue
            if update is not None:
                if update.finish_reason is not None:
                    self._remove(running)
                yield update

    def _finished_updates(self, sampler: SlotSampler[Any]) -> Iterator[SequenceUpdate]:
        """Yield the last updates of finished jobs, which have left their slots."""
        finished: list[FinishedSequence] = list(sampler.finished)
        sampler.finished.clear()
        for sequence in finished:
            running = self._running.pop(id(sequence.request))
            try:
                final = self._until_end_token(sequence.ids)
                text = running.stream.push(final, is_last=True)
                is_stop = running.stream.is_stopped or sequence.stopped_by == "end"
                yield self._update(running, sequence, text, len(final), "stop" if is_stop else "length")
            except Exception as error:
                yield SequenceUpdate(running.job, failure=error)

    def _running_update(
        self, running: _RunningJob, sequence: RunningSequence, ids: Tensor, is_masked: Tensor, confidence: Tensor
    ) -> SequenceUpdate | None:
        """Return the update of a running job, with a finish reason if it contains a stop text; None if unchanged."""
        job, final = running.job, self._final_ids(sequence)
        seen = (len(final), int(is_masked.sum()) if job.stream_canvas else 0)
        if seen == running.num_seen:
            return None
        running.num_seen = seen
        text = running.stream.push(final, is_last=False)
        if running.stream.is_stopped:
            return self._update(running, sequence, text, len(final), "stop")
        if not (job.is_streamed and (text or job.stream_canvas)):
            return None
        canvas = self._canvas(job, sequence, ids, is_masked, confidence) if job.stream_canvas else None
        return self._update(running, sequence, text, len(final), None, canvas)

    def _update(
        self,
        running: _RunningJob,
        sequence: RunningSequence | FinishedSequence,
        text: str,
        num_tokens: int,
        reason: FinishReason | None,
        canvas: CanvasTokens | None = None,
    ) -> SequenceUpdate:
        if reason is not None:
            self.num_tokens += num_tokens
            text = text if running.job.is_streamed else running.stream.sent
        num_cached_tokens = max(0, sequence.num_cached_tokens - 1)  # without the start token, which clients do not send
        return SequenceUpdate(
            running.job,
            text,
            canvas,
            reason,
            num_tokens,
            sequence.num_denoising_calls,
            sequence.num_cache_calls,
            num_cached_tokens,
        )

    def _final_ids(self, sequence: RunningSequence) -> list[int]:
        """Return the ids of a running sequence that cannot change any more, without its prompt."""
        if isinstance(sequence, CanvasState):
            return self._until_end_token(sequence.ids)
        start = len(sequence.request.prompt)
        return self._until_end_token(sequence.ids[start : start + sequence.request.length_tokens])

    def _until_end_token(self, ids: list[int]) -> list[int]:
        end_id = self.model.tokenizer_identity.end_id
        return ids[: ids.index(end_id)] if end_id in ids else ids

    def _canvas(
        self, job: Job, sequence: RunningSequence, ids: Tensor, is_masked: Tensor, confidence: Tensor
    ) -> CanvasTokens:
        """Return the current block, or the whole generated part of a canvas, without the positions of the prompt."""
        start, num_given = 0, 0
        if isinstance(sequence, SequenceState):
            start = max(0, sequence.block_start - len(job.prompt))
            num_given = max(0, len(job.prompt) - sequence.block_start)
        positions = zip(
            ids[num_given:].tolist(),
            is_masked[num_given:].tolist(),
            confidence.exp()[num_given:].tolist(),
            strict=True,
        )
        decode = self.model.decode
        tokens: list[list[str | float | None]] = [
            [None, 0.0] if masked else [decode([token]), round(p, 3)] for token, masked, p in positions
        ]
        return {"start": start, "tokens": tokens[: job.length_tokens - start]}

    def _expired(self, running: _RunningJob) -> SequenceUpdate:
        """Remove a job whose deadline has passed; return its last update."""
        sequence = next(state for state, *_ in running.sampler.running() if state.request is running.request)
        self._remove(running)
        return self._update(running, sequence, "", len(self._final_ids(sequence)), "deadline")

    def _remove(self, running: _RunningJob) -> None:
        del self._running[id(running.request)]
        running.sampler.remove(running.request)

    def _sampler(self, size: int | None) -> SlotSampler[Any]:
        """Return the sampler for a block size; None for whole canvases."""
        model, settings = self.model, self.settings
        if size is None:
            return CanvasSampler(
                model.denoiser,
                model.pattern,
                capacity_tokens=model.sequence_length,
                device=model.device,
                num_slots=settings.slots,
                fixed_shapes=settings.batch_invariant,
            )
        forbidden = model.forbidden_token_ids(False, ())
        return BlockSampler(
            model.denoiser,
            Confidence(Polynomial()),  # a placeholder: each request has its own rule
            block_tokens=size,
            capacity_tokens=model.sequence_length // size * size,
            num_steps=size,
            adjust=banned(forbidden) if forbidden else None,
            is_context_causal=is_context_causal(model.objective),
            prefix_bytes=settings.prefix_cache_mib * 2**20,
            num_slots=settings.slots,
            fixed_shapes=settings.batch_invariant,
        )


def _block_sizes(model: TextModel, settings: EngineSettings) -> tuple[int | None, ...]:
    """Return the trained block size and those of `engine.block_tokens`, checked."""
    trained = model.sampling_target()
    for size in settings.block_tokens:
        if trained.kind == "autoregressive":
            allowed = "blocks of 1 token"
        else:
            allowed = f"blocks whose size divides its context of {model.sequence_length}"
        is_divisor = model.sequence_length % size == 0 and size != model.sequence_length
        if trained.kind == "autoregressive" or not is_divisor:
            raise UserError(f"engine.block_tokens={size}: this checkpoint is sampled in {allowed}; change it")
    return tuple(dict.fromkeys((trained.block_tokens, *settings.block_tokens)))


def _is_late(job: Job, now: float) -> bool:
    return job.deadline is not None and now >= job.deadline
