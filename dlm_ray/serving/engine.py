"""Continuous batching of denoising: slots of one text each, one network call a tick for all of them, whatever block or step each is in.

No thread, no clock of its own, no HTTP: `submit`, `tick`, `cancel`. Texts join and leave between ticks. The random numbers of a text are a function of
its seed and number alone. Without fixed shapes, rounding in company may differ from rounding alone, and now and then decide a token.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlm_ray.config.errors import UserError
from dlm_ray.config.server import Engine as EngineSettings
from dlm_ray.diffusion.objectives import SsdLm
from dlm_ray.diffusion.samplers.adjust import banned
from dlm_ray.diffusion.samplers.blocks import BlockSampler
from dlm_ray.diffusion.samplers.canvases import CanvasRequest, CanvasSampler
from dlm_ray.diffusion.samplers.requests import Request, SamplingParams, Stops
from dlm_ray.diffusion.samplers.rules import Confidence, SelectionRule
from dlm_ray.diffusion.schedules import Polynomial
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.generation.text_model import TextModel
from dlm_ray.serving.jobs import Job, SequenceUpdate, TextStream


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
        if isinstance(model.objective, SsdLm):
            raise UserError(
                "this checkpoint is an SSD-LM, whose blocks are no slots of a batch: it cannot be served; sample it with dlm-ray sample"
            )
        self.model, self.settings = model, settings
        own = model.sampled_as()
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
            assert job.chosen.block_tokens in self._samplers, f"no slots for blocks of {job.chosen.block_tokens}"
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
        """
        now = time.monotonic() if now is None else now
        updates = [self._expired(one) for one in list(self._running.values()) if _is_late(one.job, now)]
        updates += [SequenceUpdate(job, finish_reason="deadline") for job in self.waiting if _is_late(job, now)]
        self.waiting = deque(job for job in self.waiting if not _is_late(job, now))
        self._admit()
        for sampler in self._samplers.values():
            if sampler.num_active:
                self.num_ticks += 1
                sampler.tick()
                updates += self._told(sampler)
        return updates

    def _admit(self) -> None:
        joining: dict[int | None, list[Any]] = {}
        while self.waiting and len(self._running) < self.settings.slots:
            job = self.waiting.popleft()
            size = job.chosen.block_tokens
            request = self._request(job)
            joining.setdefault(size, []).append(request)
            stream = TextStream(self.model.tokenizer.decode, job.stops)
            self._running[id(request)] = _Running(job, request, self._samplers[size], stream)
        for size, requests in joining.items():
            self._samplers[size].add(requests)

    def _request(self, job: Job) -> Any:
        chosen, rule = job.chosen, self.model.rule(job.chosen)
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
            final = self._final(text)
            seen = (len(final), int(is_masked.sum()) if running.job.stream_canvas else 0)
            if seen == running.num_seen:
                continue
            running.num_seen = seen
            new = running.stream.push(final, is_last=False)
            if running.stream.is_stopped:
                self._remove(running)
                yield self._update(running, text, new, len(final), "stop")
            elif running.job.is_streamed and (new or running.job.stream_canvas):
                canvas = (
                    self._canvas(running.job, text, ids, is_masked, confidence) if running.job.stream_canvas else None
                )
                yield self._update(running, text, new, len(final), None, canvas)
        for text in sampler.finished:
            running = self._running.pop(id(text.request))
            final = self._cut(text.ids)
            new = running.stream.push(final, is_last=True)
            is_stop = running.stream.is_stopped or text.stopped_by == "end"
            yield self._update(running, text, new, len(final), "stop" if is_stop else "length")
        sampler.finished.clear()

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
        if job.chosen.block_tokens is not None:
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


def _is_late(job: Job, now: float) -> bool:
    return job.deadline is not None and now >= job.deadline
