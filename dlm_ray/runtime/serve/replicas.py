"""What runs inside Ray Serve: replicas that hold models and denoise, and the ingress in front of them that speaks HTTP and holds none.

An ingress of its own sees a replica die and says so, or asks another one; Serve's proxy could only break the connection. The limits of what
waits are the ingress's, so nothing queues inside Serve, and deadlines are the engine's, because Serve's timeout would cut streams.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from dlm_ray.config.server import Server
from dlm_ray.config.server_file import read_keys
from dlm_ray.serving.errors import Event, ReplicaLost

log = logging.getLogger("dlm_ray.serving")


class Replica:
    """Engines of the service's models, as many at once as one replica holds."""

    async def __init__(self, server: dict[str, Any]):  # type: ignore[misc]  # Serve awaits it
        from dlm_ray.runtime.serve.shards import Shards  # and with them torch, which the ingress does without
        from dlm_ray.serving.model_pool import ModelPool

        _log_to_the_replica()
        own = Server.model_validate(server)
        self._shards = Shards(own) if own.replicas.shards > 1 else None
        group = self._shards.group if self._shards else None
        self._residents = ModelPool(own, serve.multiplexed(max_num_models_per_replica=own.models_at_once), group)
        await self._residents.load()
        if self._shards:
            self._shards.watch()

    async def describe(self) -> list[dict[str, Any]]:
        """The models' cards."""
        return await self._residents.describe()

    async def generate(self, task: Any) -> AsyncGenerator[list[Event]]:
        """Events of a task."""
        events = self._residents.generate(task)
        try:
            async for some in events:
                yield some
        finally:
            await events.aclose()

    async def score(self, model: str, text: str, draws: int, seed: int) -> Event:
        """A text's bound by a model."""
        return await self._residents.score(model, text, draws, seed)

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        self._residents.check()


class Replicas:
    """`serving.service.Backend` over a handle."""

    def __init__(self, handle: DeploymentHandle):
        self._handle = handle

    async def describe(self) -> list[dict[str, Any]]:
        """The models' cards, by any replica."""
        return await _answered(self._handle.describe.remote())

    async def score(self, model: str, text: str, draws: int, seed: int) -> Event:
        """A text's bound, by a replica that holds the model if there is one."""
        return await _answered(self._handle.options(multiplexed_model_id=model).score.remote(model, text, draws, seed))

    async def generate(self, task: Any) -> AsyncGenerator[list[Event]]:
        """Events of a task, by a replica that holds the model if there is one."""
        events: Any = self._handle.options(stream=True, multiplexed_model_id=task["model"]).generate.remote(task)
        try:
            async for some in events:
                yield some
        except (RayActorError, DeploymentUnavailableError) as error:
            raise ReplicaLost from error
        finally:
            events.cancel()


class Ingress:
    """HTTP in front of the replicas."""

    def __init__(self, server: dict[str, Any], needs_keys: bool, engine: DeploymentHandle):
        _log_to_the_replica()
        self._server = Server.model_validate(server)
        self._keys = read_keys(self._server.http.api_keys_file)
        if needs_keys and not self._keys:
            raise RuntimeError(
                "this process has no API keys: DLM_RAY_API_KEYS or http.api_keys_file has to be there on its node, too"
            )
        self._backend = Replicas(engine)

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve after the constructor."""
        from dlm_ray.serving.http.app import build

        engine, replicas = self._server.engine, self._server.replicas
        count = replicas.autoscaling.max_replicas if replicas.autoscaling is not None else replicas.count
        texts = count * self._server.models_at_once * (engine.slots + engine.max_waiting)
        return build(self._server, self._backend, self._keys, texts, is_named=True)

    def settings(self) -> dict[str, Any]:
        """What the service was started with."""
        return self._server.model_dump(mode="json")


async def _answered(response: Any) -> Any:
    try:
        return await response
    except (RayActorError, DeploymentUnavailableError) as error:
        raise ReplicaLost from error


def _log_to_the_replica() -> None:
    """Every request's line goes to the process's log, with its id."""
    log.setLevel(logging.INFO)
