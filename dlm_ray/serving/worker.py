"""An engine in its own thread, with an asynchronous interface for concurrent requests. No HTTP, no Ray.

Inputs and outputs are plain values (strings, numbers, lists), because they cross process boundaries.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future

from dlm_ray.config.server import Server
from dlm_ray.generation.loading import load
from dlm_ray.serving.engine import Engine, NetworkLost
from dlm_ray.serving.errors import ApiError, error_event, error_fields, overloaded
from dlm_ray.serving.jobs import Job, SequenceUpdate
from dlm_ray.serving.messages import Event, ModelCard, Score, Task
from dlm_ray.serving.processor import RequestProcessor
from dlm_ray.serving.sharding import Group, LeaderDenoiser

log = logging.getLogger("dlm_ray.serving")
Notify = Callable[[SequenceUpdate | ApiError], None]
"""Sends an update of a job, or the error that ends its request, from the engine's thread to the request."""


class EngineWorker:
    """The engine of one model in a replica.

    Args:
        server: the service's settings, with one model.
        group: the processes that share the network, which this one leads; None if this process has the whole network.
    """

    def __init__(self, server: Server, group: Group | None = None):
        self.server = server
        [served] = server.served
        self.model = load(served.checkpoint, served.weights, device=server.device, mesh=group.mesh if group else None)
        self._leader: LeaderDenoiser | None = None
        if group is not None:
            self._leader = self.model.denoiser = LeaderDenoiser(group, self.model.denoiser)
        self.engine = Engine(self.model, server.engine)
        self.processor = RequestProcessor(self.model, self.engine, server)
        self._changed = threading.Condition()
        self._inbox: list[Callable[[], object]] = []
        self._notify: dict[Job, Notify] = {}
        self._is_stopped = self._is_broken = self._is_ended = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    def describe(self) -> ModelCard:
        """Return the model's entry in /v1/models: its capabilities, its limits and this replica's load."""
        return {
            **self.processor.card(),
            "load": {"active": self.engine.num_active, "waiting": len(self.engine.waiting)},
        }

    def check(self) -> None:
        """Raise RuntimeError if the engine has ended without `close`."""
        if self._is_lost():
            raise RuntimeError("the processes that share the network have lost each other")
        if not (self._thread.is_alive() or self._is_stopped):
            raise RuntimeError("the engine's thread has ended")

    async def generate(self, task: Task) -> AsyncGenerator[list[Event]]:
        """Yield the events of a request in batches; closing the generator frees the slots before the next tick.

        Yields:
            `prompt_tokens` first; then for the text `index`: its final `text`, its `canvas`, its `finish_reason` with
            counts; or one `error`.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[SequenceUpdate | ApiError] = asyncio.Queue()
        try:
            jobs, prompt_event = self.processor.jobs(task)
            if len(self._notify) + len(jobs) > self.server.engine.slots + self.server.engine.max_waiting:
                raise overloaded()
        except ApiError as error:
            yield [error_event(error)]
            return

        def notify(update: SequenceUpdate | ApiError) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed, and the request with it
                loop.call_soon_threadsafe(queue.put_nowait, update)

        for job in jobs:
            self._notify[job] = notify
        if not self._do(lambda: self.engine.submit(jobs)):
            notify(_ended())
        unfinished = set(jobs)
        try:
            yield [prompt_event]
            indices = {job: index for index, job in enumerate(jobs)}
            while unfinished:
                updates = [await queue.get()]
                while not queue.empty():
                    updates.append(queue.get_nowait())
                events, has_failed = _events(updates, indices, unfinished)
                yield events
                if has_failed:
                    return
        finally:
            for job in jobs:
                self._notify.pop(job, None)
            if unfinished:
                self._do(lambda: self.engine.cancel(unfinished))

    async def score(self, text: str, draws: int, seed: int) -> Score:
        """Return the bits of a text, or a bound on them, with the interval over draws; or an `error`."""
        try:
            ids = self.processor.scored_ids(text, draws)
        except ApiError as error:
            return {"error": error_fields(error)}
        done: Future[Score] = Future()

        def work() -> None:
            if not done.set_running_or_notify_cancel():
                return  # the request was cancelled
            try:
                done.set_result(self.processor.score(ids, len(text.encode()), draws, seed))
            except Exception as error:
                log.exception("scoring failed")
                failure = ApiError(500, f"scoring failed: {type(error).__name__}", "internal")
                done.set_result({"error": error_fields(failure)})

        return await asyncio.wrap_future(done) if self._do(work) else {"error": error_fields(_ended())}

    def close(self) -> None:
        """End the thread after its current tick, and the followers that share the network."""
        self._do(self._stop)
        self._thread.join(timeout=10)
        if self._leader is not None and not self._thread.is_alive():
            self._leader.stop()

    def _stop(self) -> None:
        self._is_stopped = True

    def _is_lost(self) -> bool:
        return self._leader is not None and self._leader.is_lost

    def _do(self, action: Callable[[], object]) -> bool:
        """Run an action in the engine's thread before its next tick; return False if the thread has ended."""
        with self._changed:
            if not self._is_ended:
                self._inbox.append(action)
                self._changed.notify()
            return not self._is_ended

    def _work(self) -> None:
        try:
            while not (self._is_stopped or self._is_broken or self._is_lost()):
                with self._changed:
                    while not (self._inbox or self.engine.num_active or self.engine.waiting):
                        self._changed.wait()
                    actions, self._inbox = self._inbox, []
                for action in actions:
                    self._run(action)
                self._tick()
        finally:
            self._end()

    def _run(self, action: Callable[[], object]) -> None:
        try:
            action()
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
                log.error("request %s failed", update.job.request_id, exc_info=update.failure)
            notify = self._notify.get(update.job)
            if notify is not None:
                notify(update)

    def _fail(self, error: Exception) -> None:
        """Fail all requests and replace the engine, after an error that is not caused by one job's data."""
        requests = dict(self._notify)
        request_ids = sorted({job.request_id for job in requests})
        log.error("the engine failed, and with it requests %s", request_ids, exc_info=error)
        for notify in requests.values():
            notify(_failed())
        if self._is_lost():
            return
        try:
            self.engine = Engine(self.model, self.server.engine)
        except Exception as restart_error:
            log.error("the engine cannot be restarted", exc_info=restart_error)
            self._is_broken = True

    def _end(self) -> None:
        """Send an error to all requests that wait, and refuse later ones."""
        with self._changed:
            self._is_ended = True
            actions, self._inbox = self._inbox, []
        for action in actions:
            with contextlib.suppress(Exception):
                action()
        for notify in dict(self._notify).values():
            notify(_ended())


def _failed() -> ApiError:
    return ApiError(500, "denoising failed on this replica; see its log under the request id", "internal")


def _ended() -> ApiError:
    return ApiError(
        503, "this replica's engine has ended; send the request again", "replica_lost", retry_after_seconds=1
    )


def _events(
    updates: list[SequenceUpdate | ApiError], indices: dict[Job, int], unfinished: set[Job]
) -> tuple[list[Event], bool]:
    """Return the events of updates up to the first error, and whether there is one.

    Args:
        updates: in order.
        indices: the index of each job's text in its request.
        unfinished: the request's unfinished jobs; those that finish or fail are removed.
    """
    events: list[Event] = []
    for update in updates:
        if isinstance(update, ApiError):
            return [*events, error_event(update)], True
        if update.failure is not None:
            unfinished.discard(update.job)
            return [*events, error_event(_failed())], True
        events.append(_event(update, indices[update.job]))
        if update.finish_reason is not None:
            unfinished.discard(update.job)
    return events, False


def _event(update: SequenceUpdate, index: int) -> Event:
    event: Event = {"index": index, "num_tokens": update.num_tokens}
    if update.text:
        event["text"] = update.text
    if update.canvas is not None:
        event["canvas"] = update.canvas
    if update.finish_reason is not None:
        event["finish_reason"] = update.finish_reason
        event["calls"] = [update.num_denoising_calls, update.num_cache_calls]
        # A prompt counts once per request, whatever n is.
        event["cached_tokens"] = update.num_cached_tokens if update.job.number == 0 else 0
    return event
