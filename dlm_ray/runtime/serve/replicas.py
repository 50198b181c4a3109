"""The deployments of Ray Serve: replicas that hold models and denoise, and the HTTP ingress in front of them.

The ingress holds no model. It sees a replica die, and reports that or asks another replica, where Serve's proxy could
only break the connection. It also limits what waits, so nothing queues inside Serve; deadlines are the engine's,
because Serve's timeout would cut streams.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable
from typing import TYPE_CHECKING, Any, TypeVar

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.server import Server
from dlm_ray.config.server_file import read_keys
from dlm_ray.serving.errors import ReplicaLost

if TYPE_CHECKING:
    from dlm_ray.serving.messages import Event, ModelCard, Score, Task

log = logging.getLogger("dlm_ray.serving")
T = TypeVar("T")


class Replica:
    """A replica: engines of the service's models, as many at once as it may hold."""

    async def __init__(self, server: JsonObject):  # type: ignore[misc]  # Serve awaits it
        # These import torch, which the ingress does without.
        from dlm_ray.runtime.serve.shards import Shards
        from dlm_ray.serving.model_pool import ModelPool

        _log_requests()
        config = Server.model_validate(server)
        self._shards = Shards(config) if config.replicas.shards > 1 else None
        group = self._shards.group if self._shards else None
        self._pool = ModelPool(config, serve.multiplexed(max_num_models_per_replica=config.models_at_once), group)
        await self._pool.load()
        if self._shards:
            self._shards.watch()

    async def describe(self) -> list[ModelCard]:
        """Return the descriptions of all models."""
        return await self._pool.describe()

    async def generate(self, task: Task) -> AsyncGenerator[list[Event]]:
        """Yield the events of a task."""
        stream = self._pool.generate(task)
        try:
            async for events in stream:
                yield events
        finally:
            await stream.aclose()

    async def score(self, model: str, text: str, draws: int, seed: int) -> Score:
        """Return the bound of a text under a model."""
        return await self._pool.score(model, text, draws, seed)

    def check_health(self) -> None:
        """Raise an exception if the replica is broken; Serve then replaces it."""
        self._pool.check()


class ReplicaClient:
    """The ingress's side of the replicas; implements `serving.http.service.Backend` with a Serve handle."""

    def __init__(self, handle: DeploymentHandle[Replica]):
        self._handle = handle

    async def describe(self) -> list[ModelCard]:
        """Return the descriptions of all models, from any replica."""
        return await _result(self._handle.describe.remote())

    async def score(self, model: str, text: str, draws: int, seed: int) -> Score:
        """Return the bound of a text, preferably from a replica that holds the model."""
        return await _result(self._handle.options(multiplexed_model_id=model).score.remote(model, text, draws, seed))

    async def generate(self, task: Task) -> AsyncGenerator[list[Event]]:
        """Yield the events of a task, preferably from a replica that holds the model.

        Raises:
            ReplicaLost: if the replica dies or none is available.
        """
        stream: Any = self._handle.options(stream=True, multiplexed_model_id=task["model"]).generate.remote(task)
        try:
            async for events in stream:
                yield events
        except (RayActorError, DeploymentUnavailableError) as error:
            raise ReplicaLost from error
        finally:
            stream.cancel()


class Ingress:
    """The HTTP ingress in front of the replicas."""

    def __init__(self, server: JsonObject, needs_keys: bool, engine: DeploymentHandle[Replica]):
        _log_requests()
        self._server = Server.model_validate(server)
        self._keys = read_keys(self._server.http.api_keys_file)
        if needs_keys and not self._keys:
            raise RuntimeError(
                "this process has no API keys: DLM_RAY_API_KEYS or http.api_keys_file must exist on its node, too"
            )
        self._backend = ReplicaClient(engine)

    def __serve_build_asgi_app__(self) -> Any:
        """Return the ASGI application; Serve calls this after the constructor."""
        from dlm_ray.serving.http.app import build

        engine, replicas = self._server.engine, self._server.replicas
        count = replicas.autoscaling.max_replicas if replicas.autoscaling is not None else replicas.count
        sequences = count * self._server.models_at_once * (engine.slots + engine.max_waiting)
        return build(self._server, self._backend, self._keys, sequences, has_request_ids=True)

    def settings(self) -> JsonObject:
        """Return the configuration that the service runs with."""
        return self._server.model_dump(mode="json")


async def _result(response: Awaitable[T]) -> T:
    """Return the result of a call.

    Raises:
        ReplicaLost: if the replica dies or none is available.
    """
    try:
        return await response
    except (RayActorError, DeploymentUnavailableError) as error:
        raise ReplicaLost from error


def _log_requests() -> None:
    """Let the line of every request, with its id, into the process's log."""
    log.setLevel(logging.INFO)
