"""The handling of parsed requests: admission, tasks, collected or streamed responses, and retries on a lost replica."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dlm_ray.config.server import Server
from dlm_ray.serving.errors import ApiError, ReplicaLost, error_event, no_model, raise_error
from dlm_ray.serving.http.middleware import Admission, Metrics
from dlm_ray.serving.http.protocol import GenerationRequest, Infill
from dlm_ray.serving.http.responses import Answer, Candidate, stream
from dlm_ray.serving.messages import Event, ModelCard, Score, Task

log = logging.getLogger("dlm_ray.serving")
MAX_TRIES = 4


class Backend(Protocol):
    """The engines: workers in this process, or replicas behind a Serve handle, which raise ReplicaLost if they end."""

    async def describe(self) -> list[ModelCard]:
        """Return the models' entries in /v1/models."""

    def generate(self, task: Task) -> AsyncGenerator[list[Event]]:
        """Yield the events of a task in batches; closing the generator frees its slots."""

    async def score(self, model: str, text: str, draws: int, seed: int) -> Score:
        """Return a model's bits of a text, or a bound on them."""


class Admitted:
    """The admission of a request, until the context ends or `leave` is called."""

    def __init__(self, admission: Admission, key: str, num_texts: int):
        admission.enter(key, num_texts)
        self._admission, self._key, self._num_texts, self._is_in = admission, key, num_texts, True

    def __enter__(self) -> Admitted:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Release the admission; further calls do nothing."""
        if self._is_in:
            self._is_in = False
            self._admission.leave(self._key, self._num_texts)


class Service:
    """The request handling that the paths share."""

    def __init__(self, server: Server, backend: Backend, admission: Admission, metrics: Metrics):
        self.server, self.backend, self.admission, self.metrics = server, backend, admission, metrics

    async def check_model(self, name: str) -> None:
        """Raise ApiError if the service has no such model."""
        if name in self.server.model_names:
            return
        # During an update of the service, its replicas may have other models than its settings.
        names = [card["id"] for card in await self.backend.describe()]
        if name not in names:
            raise no_model(name, names)

    async def task(
        self,
        body: GenerationRequest,
        request: Request,
        *,
        lengths: int | list[int] | None,
        length_field: str,
        prompts: list[str] | list[list[int]] | None = None,
        messages: list[dict[str, str]] | None = None,
        suffix: str | None = None,
    ) -> Task:
        """Return the task of a request, after the checks that need no tokenizer."""
        await self.check_model(body.model)
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options needs stream=true; remove it", "invalid_value", "stream_options")
        return {
            "request_id": request.state.request_id,
            "model": body.model,
            "prompts": prompts or [],
            "messages": messages,
            "suffix": suffix,
            "lengths": lengths if isinstance(lengths, list) else [] if lengths is None else [lengths],
            "length_field": length_field,
            "n": body.n or 1,
            "seed": body.seed,
            "stops": body.stops(),
            "options": body.options(),
            "is_streamed": bool(body.stream),
            "stream_canvas": bool(body.stream_options and body.stream_options.denoising),
            "timeout_seconds": body.timeout_seconds,
        }

    async def infill_task(self, body: Infill, request: Request, lengths: int | list[int]) -> Task:
        """Return the task of an infill request with one or several lengths."""
        return await self.task(
            body,
            request,
            lengths=lengths,
            length_field="length_tokens",
            prompts=[body.prefix],
            suffix=body.suffix,
        )

    def admitted(self, request: Request, num_texts: int) -> Admitted:
        """Admit a request, or raise ApiError beyond the limits."""
        return Admitted(self.admission, request.state.key, num_texts)

    async def answer(self, body: GenerationRequest, task: Task, request: Request, *, is_chat: bool) -> Response:
        """Run a task and return its response, streamed or not."""
        answer = self._answer(task, is_chat)
        num_texts = (len(task["prompts"]) or 1) * task["n"]
        if num_texts > self.server.limits.choices:
            limit = self.server.limits.choices
            message = f"{num_texts} texts in one request (prompts times n); at most {limit} are allowed; reduce n"
            raise ApiError(400, message, "too_many_choices", "n")
        if not body.stream:
            with self.admitted(request, num_texts):
                await self._collect(task, answer, request)
            return JSONResponse(answer.body())
        admitted = self.admitted(request, num_texts)
        try:
            first, events = await self._begin(task)
        except BaseException:
            admitted.leave()
            raise
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        batches = _with_first(first, events)
        chunks = stream(answer, batches, include_usage)

        async def end() -> None:
            admitted.leave()
            self._count(answer)
            for generator in (chunks, batches, events):
                await generator.aclose()

        return _Stream(chunks, end)

    async def infill_best(self, body: Infill, request: Request) -> Response:
        """Infill with several lengths; return the candidate whose whole text has the fewest bits per byte."""
        if body.stream or (body.n or 1) > 1:
            raise ApiError(
                400,
                "several lengths need one text without streaming; remove stream and n",
                "invalid_value",
                "length_tokens",
            )
        assert isinstance(body.length_tokens, list), "one length has one candidate"
        lengths = list(dict.fromkeys(body.length_tokens))
        task = await self.infill_task(body, request, lengths)
        answer = self._answer(task, False)
        with self.admitted(request, len(lengths)):
            await self._collect(task, answer, request)
            texts = [answer.choices[index].text for index in range(len(lengths))]
            scores = [await self._score(body.model, body.prefix + text + body.suffix) for text in texts]
        best = min(range(len(lengths)), key=lambda index: _or_infinite(scores[index]["bits_per_byte"]))
        response = answer.body()
        response["choices"] = [{**response["choices"][best], "index": 0}]
        candidates: list[Candidate] = [
            {
                "length_tokens": length,
                "text": text,
                "bits_per_byte": score["bits_per_byte"],
                "ci95_draws": score["ci95_draws"],
            }
            for length, text, score in zip(lengths, texts, scores, strict=True)
        ]
        response["dlm_ray"] |= {"length_tokens": lengths[best], "candidates": candidates}
        return JSONResponse(response)

    async def _score(self, model: str, text: str) -> Score:
        """Return the score of a candidate's whole text, with None as values if the text cannot be scored.

        An empty text cannot be scored, nor one that is tokenized into more tokens than were generated (an incomplete
        character is) and than the context has.
        """
        score = await self.backend.score(model, text, min(16, self.server.limits.score_draws), 0)
        if "error" in score and score["error"][0] == 400:
            return {"bits_per_byte": None, "ci95_draws": None}
        raise_error(score)
        return score

    def _answer(self, task: Task, is_chat: bool) -> Answer:
        maximum = self.server.engine.deadline_seconds
        return Answer(task["request_id"], task["model"], is_chat, min(maximum, task["timeout_seconds"] or maximum))

    async def _collect(self, task: Task, answer: Answer, request: Request) -> None:
        """Collect all events of a task; retry when its replica is lost, and stop when the client disconnects."""

        async def work() -> None:
            for number in range(1, MAX_TRIES + 1):
                answer.choices.clear()
                try:
                    async with aclosing(self.backend.generate(task)) as events:
                        async for batch in events:
                            for event in batch:
                                answer.take(event)
                    return
                except ReplicaLost:
                    log.warning("%s lost its replica, try %d of %d", task["request_id"], number, MAX_TRIES)
            raise _lost()

        working, gone = asyncio.ensure_future(work()), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ApiError(499, "the client has disconnected", "client_gone")
            working.result()
        finally:
            for future in (working, gone):
                future.cancel()
            await asyncio.gather(working, gone, return_exceptions=True)
            self._count(answer)

    async def _begin(self, task: Task) -> tuple[list[Event], AsyncGenerator[list[Event]]]:
        """Return the first events and the rest, so that an invalid request fails before its stream starts."""
        for number in range(1, MAX_TRIES + 1):
            events = self.backend.generate(task)
            try:
                first = await anext(events)
                raise_error(first[0])
                return first, events
            except ReplicaLost:
                log.warning("%s lost its replica, try %d of %d", task["request_id"], number, MAX_TRIES)
            except BaseException:
                await events.aclose()
                raise
        raise _lost()

    def _count(self, answer: Answer) -> None:
        num_completion_tokens = sum(choice.num_tokens for choice in answer.choices.values())
        self.metrics.totals["prompt_tokens_total"] += answer.prompt_tokens
        self.metrics.totals["cached_prompt_tokens_total"] += answer.cached_tokens
        self.metrics.totals["completion_tokens_total"] += num_completion_tokens
        for kind, calls in answer.network_calls.items():
            self.metrics.totals[f"{kind}_calls_total"] += calls


class _Stream(StreamingResponse):
    """A stream of server-sent events that always calls `end`, even if the client disconnects before the first event."""

    def __init__(self, chunks: AsyncGenerator[bytes], end: Callable[[], Awaitable[None]]):
        super().__init__(
            chunks, media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._end()


async def _with_first(first: list[Event], events: AsyncGenerator[list[Event]]) -> AsyncGenerator[list[Event]]:
    """Yield the first and all other events; a lost replica becomes an error as the last event."""
    yield first
    try:
        async for batch in events:
            yield batch
    except ReplicaLost:
        yield [error_event(_lost())]


async def _disconnected(request: Request) -> None:
    """Wait until the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _or_infinite(bits: float | None) -> float:
    return math.inf if bits is None else bits


def _lost() -> ApiError:
    return ApiError(
        503,
        "the replica that processed this request has ended; send the request again",
        "replica_lost",
        retry_after_seconds=1,
    )
