"""A checkpoint that works for many: an engine in a thread of its own, and requests that wait for it without blocking. No HTTP, no Ray.

What comes in and goes out is plain (texts, numbers, lists), as it crosses a border between processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from typing import Any

from dlm_ray.config.server import Server
from dlm_ray.generation.loading import load
from dlm_ray.serving.engine import Engine, NetworkLost
from dlm_ray.serving.errors import ApiError, Event, error_event, overloaded
from dlm_ray.serving.jobs import Job, SequenceUpdate, Task
from dlm_ray.serving.planner import Planner
from dlm_ray.serving.sharding import Group, Leader

log = logging.getLogger("dlm_ray.serving")


class EngineWorker:
    """One model's work in a replica.

    Args:
        server: of one model.
        group: of the processes that hold the network with this one, which leads them; None if it holds the network alone.
    """

    def __init__(self, server: Server, group: Group | None = None):
        self.server = server
        [own] = server.served
        self.model = load(own.checkpoint, own.weights, device=server.device, mesh=group.mesh if group else None)
        self._leader = Leader(group, self.model.denoiser) if group else None
        self.engine = Engine(self.model, server.engine)
        self.planner = Planner(self.model, self.engine, server)
        self._changed = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._waiting: dict[Job, Callable[[SequenceUpdate | ApiError], None]] = {}
        self._is_stopped = self._is_broken = self._is_ended = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def describe(self) -> dict[str, Any]:
        """The model's card in /v1/models: what it can, its limits, and how busy this replica is."""
        return {**self.planner.card(), "load": {"active": self.engine.num_active, "waiting": len(self.engine.waiting)}}

    def check(self) -> None:
        """Raises RuntimeError if the engine does not work any more, though nobody has ended it."""
        if self._is_lost():
            raise RuntimeError("the processes that hold the network have lost each other")
        if not (self._thread.is_alive() or self._is_stopped):
            raise RuntimeError("the engine's thread has ended")

    async def generate(self, task: Task) -> AsyncGenerator[list[Event]]:
        """Events of a request's texts, several at a time; when whoever reads them stops, the slots are free before the next tick.

        Yields:
            `prompt_tokens` first; then of text `index`: `text` that is final, `canvas`, `finish_reason` with its counts; or one `error`.
        """
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[SequenceUpdate | ApiError] = asyncio.Queue()
        try:
            jobs, before = self.planner.jobs(task)
            if len(self._waiting) + len(jobs) > self.server.engine.slots + self.server.engine.max_waiting:
                raise overloaded()
        except ApiError as error:
            yield [error_event(error)]
            return

        def tell(update: SequenceUpdate | ApiError) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and whoever waited there is gone with it
                loop.call_soon_threadsafe(news.put_nowait, update)

        numbers = {job: number for number, job in enumerate(jobs)}
        for job in jobs:
            self._waiting[job] = tell
        if not self._do(lambda: self.engine.submit(jobs)):
            tell(_ended())
        left = set(jobs)
        try:
            yield [before]
            while left:
                events: list[Event] = []
                updates = [await news.get()]
                while not news.empty():
                    updates.append(news.get_nowait())
                for update in updates:
                    if isinstance(update, SequenceUpdate) and update.failure is not None:
                        left.discard(update.job)
                        update = _failed()
                    if isinstance(update, ApiError):
                        yield [*events, error_event(update)]
                        return
                    events.append(_event(update, numbers[update.job]))
                    if update.finish_reason is not None:
                        left.discard(update.job)
                yield events
        finally:
            for job in jobs:
                self._waiting.pop(job, None)
            if left:
                self._do(lambda: self.engine.cancel(left))

    async def score(self, text: str, draws: int, seed: int) -> Event:
        """The (bound on the) bits of a text, with the interval over draws; or an `error`."""
        try:
            ids = self.planner.scored_ids(text, draws)
        except ApiError as error:
            return error_event(error)
        done: Future[Event] = Future()

        def work() -> None:
            if not done.set_running_or_notify_cancel():
                return  # nobody waits any more
            try:
                done.set_result(self.planner.score(ids, len(text.encode()), draws, seed))
            except Exception as error:
                log.exception("scoring failed")
                done.set_result(error_event(ApiError(500, f"scoring failed: {type(error).__name__}", "internal")))

        return await asyncio.wrap_future(done) if self._do(work) else error_event(_ended())

    def close(self) -> None:
        """Ends the thread after its tick, and lets the processes go that hold the network with this one."""
        self._do(self._stop)
        self._thread.join(timeout=10)
        if self._leader is not None and not self._thread.is_alive():
            self._leader.stop()

    def _stop(self) -> None:
        self._is_stopped = True

    def _is_lost(self) -> bool:
        return self._leader is not None and self._leader.is_lost

    def _do(self, act: Callable[[], Any]) -> bool:
        """In the engine's thread, before its next tick; False if the thread has ended, and nothing is done any more."""
        with self._changed:
            if not self._is_ended:
                self._inbox.append(act)
                self._changed.notify()
            return not self._is_ended

    def _work(self) -> None:
        try:
            while not (self._is_stopped or self._is_broken or self._is_lost()):
                with self._changed:
                    while not (self._inbox or self.engine.num_active or self.engine.waiting):
                        self._changed.wait()
                    acts, self._inbox = self._inbox, []
                for act in acts:
                    self._act(act)
                self._tick()
        finally:
            self._end()

    def _act(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:
            self._fail(error)

    def _tick(self) -> None:
        try:
            updates = self.engine.tick()
        except NetworkLost as error:
            log.error("the engine ends", exc_info=error)
            self._is_broken = True
            return
        except Exception as error:
            self._fail(error)
            return
        for update in updates:
            if update.failure is not None:
                log.error("request %s failed, and no other with it", update.job.request_id, exc_info=update.failure)
            tell = self._waiting.get(update.job)
            if tell is not None:
                tell(update)

    def _fail(self, error: Exception) -> None:
        """The engine itself is at fault, not one job's data (those fail alone): every request is told, and it starts anew without them."""
        waiting = dict(self._waiting)
        log.error(
            "the engine failed, and with it requests %s", sorted({job.request_id for job in waiting}), exc_info=error
        )
        for tell in waiting.values():
            tell(_failed())
        if self._is_lost():
            return
        try:
            self.engine = Engine(self.model, self.server.engine)
        except Exception as again:
            log.error("the engine does not start anew", exc_info=again)
            self._is_broken = True

    def _end(self) -> None:
        """Whoever waits, or comes too late, is told."""
        with self._changed:
            self._is_ended = True
            acts, self._inbox = self._inbox, []
        for act in acts:
            with contextlib.suppress(Exception):
                act()
        for tell in dict(self._waiting).values():
            tell(_ended())


def _failed() -> ApiError:
    return ApiError(500, "denoising failed on this replica; its log says why under the request id", "internal")


def _ended() -> ApiError:
    return ApiError(
        503, "this replica's engine has ended; send the request again", "replica_lost", retry_after_seconds=1
    )


def _event(update: SequenceUpdate, index: int) -> Event:
    event: Event = {"index": index, "num_tokens": update.num_tokens}
    if update.text:
        event["text"] = update.text
    if update.canvas is not None:
        event["canvas"] = update.canvas
    if update.finish_reason is not None:
        event["finish_reason"] = update.finish_reason
        event["calls"] = [update.num_denoising_calls, update.num_cache_calls]
        event["cached_tokens"] = (
            update.num_cached_tokens if update.job.number == 0 else 0
        )  # a prompt counts once, whatever n is
    return event
