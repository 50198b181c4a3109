"""The models of one replica, of which some are loaded at a time: who makes room for whom, and what becomes of the texts that are under way."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any
from weakref import WeakValueDictionary

from dlm_ray.config.server import Server
from dlm_ray.serving.errors import ApiError, Event, deadline_passed, error_event, no_model
from dlm_ray.serving.jobs import Task
from dlm_ray.serving.sharding import Group
from dlm_ray.serving.worker import EngineWorker

log = logging.getLogger("dlm_ray.serving")
Loading = Callable[[str], Awaitable[EngineWorker]]


class ModelPool:
    """`service.Backend` of a service's models in this process.

    Args:
        server: with its models.
        cached: from a function that loads a model to one that remembers as many as there is room for. Before it loads one too many it calls and
            awaits `__del__` of the one that was asked for longest ago, as `serve.multiplexed` does.
        group: of the processes that hold the one model's network with this one.
    """

    def __init__(self, server: Server, cached: Callable[[Loading], Loading], group: Group | None = None):
        self._own = {model.model_name: server.of(model) for model in server.served}
        self._deadline_seconds = server.engine.deadline_seconds
        self._num_held: Counter[str] = Counter()
        self._cards: dict[str, dict[str, Any]] = {}
        self._hosts: WeakValueDictionary[str, EngineWorker] = (
            WeakValueDictionary()
        )  # which of them live is the cache's business

        async def load(name: str) -> EngineWorker:
            host = await asyncio.to_thread(EngineWorker, self._own[name], group)

            async def leave() -> None:
                await self._leave(name, host)

            vars(host)["__del__"] = leave  # of this object alone, so that it is no finalizer
            self._hosts[name], self._cards[name] = host, host.describe()
            return host

        self._resident = cached(load)

    async def load(self) -> None:
        """Each model once, so that what cannot be loaded is found before somebody asks for it; the first ones stay."""
        for name in reversed(self._own):
            await self._resident(name)

    async def describe(self) -> list[dict[str, Any]]:
        """The models' cards."""
        return [self._hosts[name].describe() if name in self._hosts else self._cards[name] for name in self._own]

    async def generate(self, task: Task) -> AsyncGenerator[list[Event]]:
        """Events of a task; the wait for its model counts towards its deadline."""
        asked = time.monotonic()
        seconds = min(self._deadline_seconds, task["timeout_seconds"] or self._deadline_seconds)
        try:
            async with self._held(task["model"], seconds) as host:
                task["timeout_seconds"] = max(1e-3, seconds - (time.monotonic() - asked))
                async with aclosing(host.generate(task)) as events:
                    async for some in events:
                        yield some
        except ApiError as error:
            yield [error_event(error)]

    async def score(self, model: str, text: str, draws: int, seed: int) -> Event:
        """A text's bound by a model."""
        try:
            async with self._held(model, self._deadline_seconds) as host:
                return await host.score(text, draws, seed)
        except ApiError as error:
            return error_event(error)

    def check(self) -> None:
        """Raises RuntimeError if an engine does not work any more."""
        for host in list(self._hosts.values()):
            host.check()

    @asynccontextmanager
    async def _held(self, name: str, seconds: float) -> AsyncIterator[EngineWorker]:
        """The model's host, when there is room for it; it stays for as long as the context lasts.

        Raises:
            ApiError: if there is no such model, it cannot be loaded any more, or there is no room in time.
        """
        if name not in self._own:
            raise no_model(name, list(self._own))
        # Goes on when whoever asked is gone: half a load, or half a farewell, would help nobody.
        holding = asyncio.ensure_future(self._hold(name))
        try:
            try:
                async with asyncio.timeout(seconds):
                    host = await asyncio.shield(holding)
            except TimeoutError as error:
                raise deadline_passed(seconds) from error
            except (ValueError, OSError, RuntimeError) as error:
                log.exception("%s could not be loaded", name)
                raise ApiError(
                    503, f"{name} could not be loaded; the log says why", "model_unavailable", "model", 10
                ) from error
            yield host
        finally:
            holding.add_done_callback(lambda _: self._let_go(name, holding))

    async def _hold(self, name: str) -> EngineWorker:
        host = await self._resident(name)
        self._num_held[name] += 1  # before anybody else runs, who might want its room
        return host

    def _let_go(self, name: str, holding: asyncio.Future[EngineWorker]) -> None:
        if not holding.cancelled() and holding.exception() is None:
            self._num_held[name] -= 1

    async def _leave(self, name: str, host: EngineWorker) -> None:
        """Ends it after everything that it has accepted."""
        while self._num_held[name]:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(host.close)
