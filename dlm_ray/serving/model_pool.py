"""The models of one replica, some of which are loaded at a time, and their eviction after their running requests."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from weakref import WeakValueDictionary

from dlm_ray.config.server import Server
from dlm_ray.serving.errors import ApiError, deadline_passed, error_event, error_fields, no_model
from dlm_ray.serving.messages import Event, ModelCard, Score, Task
from dlm_ray.serving.sharding import Group
from dlm_ray.serving.worker import EngineWorker

log = logging.getLogger("dlm_ray.serving")


class PooledModel:
    """An entry of the model cache.

    Serve's cache awaits the attribute `__del__` of an entry before it drops the entry. It is an attribute of the
    instance here, so Python's garbage collector never calls it.

    Args:
        worker: the loaded model.
        unload: ends the worker after its running requests.
    """

    def __init__(self, worker: EngineWorker, unload: Callable[[], Awaitable[None]]):
        self.worker = worker
        self.__del__ = unload


Load = Callable[[str], Awaitable[PooledModel]]


class ModelPool:
    """The `service.Backend` of a service's models in this process.

    Args:
        server: the service's settings, with its models.
        cached: wraps a function that loads a model in a cache of limited size. Before the cache loads a model beyond
            its size, it awaits `__del__` of the least recently used one, as `serve.multiplexed` does.
        group: the processes that share the network of the only model; None if this process has the whole networks.
    """

    def __init__(self, server: Server, cached: Callable[[Load], Load], group: Group | None = None):
        self._servers = {model.model_name: server.of(model) for model in server.served}
        self._deadline_seconds = server.engine.deadline_seconds
        self._num_held: Counter[str] = Counter()
        self._cards: dict[str, ModelCard] = {}
        self._workers: WeakValueDictionary[str, EngineWorker] = WeakValueDictionary()  # the cache keeps them alive

        async def load(name: str) -> PooledModel:
            worker = await asyncio.to_thread(EngineWorker, self._servers[name], group)

            async def unload() -> None:
                await self._unload(name, worker)

            self._workers[name], self._cards[name] = worker, worker.describe()
            return PooledModel(worker, unload)

        self._cached = cached(load)

    async def load(self) -> None:
        """Load each model once, so that errors appear before the first request; the first models stay loaded."""
        for name in reversed(self._servers):
            await self._cached(name)

    async def describe(self) -> list[ModelCard]:
        """Return the models' entries in /v1/models."""
        return [
            self._workers[name].describe() if name in self._workers else self._cards[name] for name in self._servers
        ]

    async def generate(self, task: Task) -> AsyncGenerator[list[Event]]:
        """Yield the events of a task; the time until its model is loaded counts towards its deadline."""
        started = time.monotonic()
        seconds = min(self._deadline_seconds, task["timeout_seconds"] or self._deadline_seconds)
        try:
            async with self._held(task["model"], seconds) as worker:
                task["timeout_seconds"] = max(1e-3, seconds - (time.monotonic() - started))
                async with aclosing(worker.generate(task)) as batches:
                    async for events in batches:
                        yield events
        except ApiError as error:
            yield [error_event(error)]

    async def score(self, model: str, text: str, draws: int, seed: int) -> Score:
        """Return a model's bits of a text, or a bound on them."""
        try:
            async with self._held(model, self._deadline_seconds) as worker:
                return await worker.score(text, draws, seed)
        except ApiError as error:
            return {"error": error_fields(error)}

    def check(self) -> None:
        """Raise RuntimeError if an engine has ended unexpectedly."""
        for worker in list(self._workers.values()):
            worker.check()

    @asynccontextmanager
    async def _held(self, name: str, seconds: float) -> AsyncIterator[EngineWorker]:
        """Load a model and keep it loaded within the context.

        Raises:
            ApiError: if the service has no such model, it cannot be loaded, or it is not loaded within `seconds`.
        """
        if name not in self._servers:
            raise no_model(name, list(self._servers))
        # A cancelled request must not cancel loading or unloading halfway.
        holding = asyncio.ensure_future(self._hold(name))
        try:
            try:
                async with asyncio.timeout(seconds):
                    worker = await asyncio.shield(holding)
            except TimeoutError as error:
                raise deadline_passed(seconds) from error
            except (ValueError, OSError, RuntimeError) as error:
                log.exception("%s could not be loaded", name)
                message = f"{name} could not be loaded; see the log"
                raise ApiError(503, message, "model_unavailable", "model", 10) from error
            yield worker
        finally:
            holding.add_done_callback(lambda _: self._release(name, holding))

    async def _hold(self, name: str) -> EngineWorker:
        pooled = await self._cached(name)
        self._num_held[name] += 1  # without an await in between, so the model cannot be unloaded before
        return pooled.worker

    def _release(self, name: str, holding: asyncio.Future[EngineWorker]) -> None:
        if not holding.cancelled() and holding.exception() is None:
            self._num_held[name] -= 1

    async def _unload(self, name: str, worker: EngineWorker) -> None:
        """End a worker after all requests that it has accepted."""
        while self._num_held[name]:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(worker.close)
