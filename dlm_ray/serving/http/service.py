"""What becomes of a request that was understood: admitted, made a task, collected or streamed, begun again when a replica is lost."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from dlm_ray.config.server import Server
from dlm_ray.serving.errors import ApiError, Event, ReplicaLost, error_event, no_model, raise_error
from dlm_ray.serving.http.middleware import Admission, Metrics, Receive, Scope, Send
from dlm_ray.serving.http.protocol import GenerationRequest, Infill
from dlm_ray.serving.http.responses import Answer, stream

if TYPE_CHECKING:
    from dlm_ray.serving.jobs import Task

log = logging.getLogger("dlm_ray.serving")
TRIES = 4


class Backend(Protocol):
    """Where texts are written: hosts in this process, or replicas behind a handle. Each raises ReplicaLost if its process is gone."""

    async def describe(self) -> list[dict[str, Any]]:
        """The models' cards."""

    def generate(self, task: Task) -> AsyncGenerator[list[Event]]:
        """Events of a task; whoever stops reading gives its slots back."""

    async def score(self, model: str, text: str, draws: int, seed: int) -> Event:
        """A text's bound by a model."""


class Admitted:
    """A place among those that are under way, for as long as the context lasts or until `leave`."""

    def __init__(self, admission: Admission, key: str, num_texts: int):
        admission.enter(key, num_texts)
        self._admission, self._key, self._num_texts, self._is_in = admission, key, num_texts, True

    def __enter__(self) -> Admitted:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Once."""
        if self._is_in:
            self._is_in = False
            self._admission.leave(self._key, self._num_texts)


class Service:
    """What the paths share."""

    def __init__(self, server: Server, backend: Backend, admission: Admission, counts: Metrics):
        self.server, self.backend, self.admission, self.counts = server, backend, admission, counts

    async def check_model(self, name: str) -> None:
        """Raises ApiError if the service has no such model."""
        if name in self.server.model_names:
            return
        names = [
            card["id"] for card in await self.backend.describe()
        ]  # while a service changes, its replicas may have others
        if name not in names:
            raise no_model(name, names)

    async def task(
        self, asked: GenerationRequest, request: Request, *, lengths: Any, length_field: str, **given: Any
    ) -> Task:
        """A task, after the checks that need no tokenizer."""
        await self.check_model(asked.model)
        if asked.stream_options is not None and not asked.stream:
            raise ApiError(400, "stream_options is for stream=true; leave it out", "invalid_value", "stream_options")
        return {
            "request_id": request.state.request_id,
            "model": asked.model,
            "prompts": given.get("prompts", []),
            "messages": given.get("messages"),
            "suffix": given.get("suffix"),
            "lengths": lengths if isinstance(lengths, list) else [] if lengths is None else [lengths],
            "length_field": length_field,
            "n": asked.n or 1,
            "seed": asked.seed,
            "stops": asked.stops(),
            "options": asked.options(),
            "is_streamed": bool(asked.stream),
            "stream_canvas": bool(asked.stream_options and asked.stream_options.denoising),
            "timeout_seconds": asked.timeout_seconds,
        }

    def admitted(self, request: Request, num_texts: int) -> Admitted:
        """Raises ApiError if there is no place."""
        return Admitted(self.admission, request.state.key, num_texts)

    async def answer(self, asked: GenerationRequest, task: Task, request: Request, *, is_chat: bool) -> Response:
        """Whole or streamed."""
        answer = self._answer(task, is_chat)
        num_texts = (len(task["prompts"]) or 1) * task["n"]
        if num_texts > self.server.limits.choices:
            most = self.server.limits.choices
            raise ApiError(
                400,
                f"{num_texts} texts in one request (prompts times n); at most {most}; ask for fewer",
                "too_many_choices",
                "n",
            )
        if not asked.stream:
            with self.admitted(request, num_texts):
                await self._collect(task, answer, request)
            return JSONResponse(answer.whole())
        admitted = self.admitted(request, num_texts)
        try:
            first, events = await self._begin(task)
        except BaseException:
            admitted.leave()
            raise
        include_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        behind = _behind(first, events)
        chunks = stream(answer, behind, include_usage)

        async def end() -> None:
            admitted.leave()
            self._count(answer)
            for one in (chunks, behind, events):
                await one.aclose()

        return _Stream(chunks, end)

    async def infill_best(self, asked: Infill, given: dict[str, Any], request: Request) -> Response:
        """Texts of several lengths, of which the one stays whose whole text has the fewest bits a byte."""
        if asked.stream or (asked.n or 1) > 1:
            raise ApiError(
                400,
                "several lengths are for one text that is not streamed; leave out stream and n",
                "invalid_value",
                "length_tokens",
            )
        assert isinstance(asked.length_tokens, list), "one length needs no choice"
        lengths = list(dict.fromkeys(asked.length_tokens))
        task = await self.task(asked, request, lengths=lengths, **given)
        answer = self._answer(task, False)
        with self.admitted(request, len(lengths)):
            await self._collect(task, answer, request)
            texts = [answer.choices[index].text for index in range(len(lengths))]
            scores = [await self._score(asked.model, asked.prefix + text + asked.suffix) for text in texts]
        best = min(range(len(lengths)), key=lambda index: _or_infinite(scores[index]["bits_per_byte"]))
        whole = answer.whole()
        whole["choices"] = [{**whole["choices"][best], "index": 0}]
        candidates = [
            {
                "length_tokens": length,
                "text": text,
                "bits_per_byte": score["bits_per_byte"],
                "ci95_draws": score["ci95_draws"],
            }
            for length, text, score in zip(lengths, texts, scores, strict=True)
        ]
        whole["dlm_ray"] |= {"length_tokens": lengths[best], "candidates": candidates}
        return JSONResponse(whole)

    async def _score(self, model: str, text: str) -> Event:
        """The bound of a candidate's whole text; without a value if it has none.

        That is a text that is empty, or one whose characters are more tokens than those that were written (an incomplete character is), too
        many for the context.
        """
        score = await self.backend.score(model, text, min(16, self.server.limits.score_draws), 0)
        if "error" in score and score["error"][0] == 400:
            return {"bits_per_byte": None, "ci95_draws": None}
        raise_error(score)
        return score

    def _answer(self, task: Task, is_chat: bool) -> Answer:
        own = self.server.engine.deadline_seconds
        return Answer(task["request_id"], task["model"], is_chat, min(own, task["timeout_seconds"] or own))

    async def _collect(self, task: Task, answer: Answer, request: Request) -> None:
        """All events, from another replica when one is lost, and none any more when the client is gone."""

        async def work() -> None:
            for number in range(1, TRIES + 1):
                answer.choices.clear()
                try:
                    async with aclosing(self.backend.generate(task)) as events:
                        async for some in events:
                            for event in some:
                                answer.take(event)
                    return
                except ReplicaLost:
                    log.warning("%s lost its replica, try %d of %d", task["request_id"], number, TRIES)
            raise _lost()

        working, gone = asyncio.ensure_future(work()), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise ApiError(499, "the client is gone", "client_gone")
            working.result()
        finally:
            for one in (working, gone):
                one.cancel()
            await asyncio.gather(working, gone, return_exceptions=True)
            self._count(answer)

    async def _begin(self, task: Task) -> tuple[list[Event], AsyncGenerator[list[Event]]]:
        """The first events and the rest: what is wrong with a request is said before a stream has begun."""
        for number in range(1, TRIES + 1):
            events = self.backend.generate(task)
            try:
                first = await anext(events)
                raise_error(first[0])
                return first, events
            except ReplicaLost:
                log.warning("%s lost its replica, try %d of %d", task["request_id"], number, TRIES)
            except BaseException:
                await events.aclose()
                raise
        raise _lost()

    def _count(self, answer: Answer) -> None:
        written = sum(choice.num_tokens for choice in answer.choices.values())
        self.counts.totals["prompt_tokens_total"] += answer.prompt_tokens
        self.counts.totals["cached_prompt_tokens_total"] += answer.cached_tokens
        self.counts.totals["completion_tokens_total"] += written
        for kind, calls in answer.network_calls.items():
            self.counts.totals[f"{kind}_calls_total"] += calls


class _Stream(StreamingResponse):
    """Server-sent events, and `end` whatever becomes of them: a client may leave before the first, and a generator that never began has no end."""

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


async def _behind(first: list[Event], events: AsyncGenerator[list[Event]]) -> AsyncGenerator[list[Event]]:
    """A stream again; that its replica is lost is its last event."""
    yield first
    try:
        async for some in events:
            yield some
    except ReplicaLost:
        yield [error_event(_lost())]


async def _disconnected(request: Request) -> None:
    """Returns when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _or_infinite(bits: float | None) -> float:
    return math.inf if bits is None else bits


def _lost() -> ApiError:
    return ApiError(
        503, "the replica that wrote this text is gone; send the request again", "replica_lost", retry_after_seconds=1
    )
