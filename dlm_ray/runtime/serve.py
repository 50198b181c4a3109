"""The service on Ray Serve: replicas that denoise, and in front of them an ingress that speaks HTTP and holds no model.

An ingress of its own sees a replica die and says so, or asks another one; Serve's proxy could only break the connection. The limits of what
waits are the ingress's, so nothing queues inside Serve, and deadlines are the engine's, because Serve's timeout would cut streams.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

from dlm_ray.runtime import cluster  # before Ray: it sets what Ray reads when it is imported

# isort: split
import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from dlm_ray.config.errors import UserError
from dlm_ray.config.server import Server
from dlm_ray.config.server_file import read_keys
from dlm_ray.serving.errors import Event, ReplicaLost

APPLICATION = "dlm_ray"
# Calls of a replica that are no texts: cards, scores, health.
_OTHER_CALLS = 16
_READY_SECONDS = 300


class Replica:
    """One engine with its checkpoint."""

    def __init__(self, server: dict[str, Any]):
        from dlm_ray.checkpoint import weights
        from dlm_ray.runtime.shards import Shards
        from dlm_ray.serving.host import Host

        _log_to_the_replica()
        own = Server.model_validate(server)
        if own.replicas.shards == 1:
            self._host = Host(own)
            return
        # Shards are of one step, and a run may commit another while they load.
        own = own.model_copy(update={"checkpoint": weights.our_checkpoint(own.checkpoint) or own.checkpoint})
        self._shards = Shards(own)
        self._host = Host(own, self._shards.group)
        self._shards.watch()

    async def describe(self) -> dict[str, Any]:
        """The model's card."""
        return self._host.describe()

    async def generate(self, task: Any) -> AsyncGenerator[list[Event]]:
        """Events of a task."""
        events = self._host.generate(task)
        try:
            async for some in events:
                yield some
        finally:
            await events.aclose()

    async def score(self, text: str, draws: int, seed: int) -> Event:
        """A text's bound."""
        return await self._host.score(text, draws, seed)

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        self._host.check()


class Replicas:
    """`serving.service.Backend` over a handle."""

    def __init__(self, handle: DeploymentHandle):
        self._handle, self._streaming = handle, handle.options(stream=True)

    async def describe(self) -> dict[str, Any]:
        """The model's card, of any replica."""
        return await self._ask("describe")

    async def score(self, text: str, draws: int, seed: int) -> Event:
        """A text's bound, by any replica."""
        return await self._ask("score", text, draws, seed)

    async def generate(self, task: Any) -> AsyncGenerator[list[Event]]:
        """Events of a task."""
        events: Any = self._streaming.generate.remote(task)
        try:
            async for some in events:
                yield some
        except (RayActorError, DeploymentUnavailableError) as error:
            raise ReplicaLost from error
        finally:
            events.cancel()

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._handle, method).remote(*arguments)
        except (RayActorError, DeploymentUnavailableError) as error:
            raise ReplicaLost from error


class Ingress:
    """HTTP in front of the replicas."""

    def __init__(self, server: dict[str, Any], needs_keys: bool, engine: DeploymentHandle):
        _log_to_the_replica()
        self._server = Server.model_validate(server)
        self._keys = read_keys(self._server.http.api_keys_file)
        if needs_keys and not self._keys:
            raise RuntimeError("this process has no API keys: DLM_RAY_API_KEYS or http.api_keys_file has to be there on its node, too")
        self._backend = Replicas(engine)

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve after the constructor."""
        from dlm_ray.serving.app import build

        engine, replicas = self._server.engine, self._server.replicas
        count = replicas.autoscaling.max_replicas if replicas.autoscaling is not None else replicas.count
        return build(self._server, self._backend, self._keys, count * (engine.slots + engine.max_waiting), is_named=True)


def application(args: dict[str, Any]) -> serve.Application:
    """The application of a server file's content; what `import_path` of a Serve config names."""
    server = Server.model_validate(args)
    plain, replicas, engine = server.model_dump(mode="json"), server.replicas, server.engine
    options: dict[str, Any] = {"num_replicas": replicas.count}
    if replicas.autoscaling is not None:
        scaling = replicas.autoscaling
        options = {
            "autoscaling_config": {
                "min_replicas": scaling.min_replicas,
                "max_replicas": scaling.max_replicas,
                "target_ongoing_requests": scaling.target_requests or engine.slots,
                "upscale_delay_s": scaling.upscale_delay_seconds,
                "downscale_delay_s": scaling.downscale_delay_seconds,
            }
        }
    each = {"CPU": replicas.cpus, "GPU": replicas.gpus}
    if replicas.shards > 1:  # they die with the replica, to whose placement group they belong
        options |= {"placement_group_bundles": [each] * replicas.shards, "placement_group_strategy": "STRICT_PACK"}
    denoising: Any = serve.deployment(
        Replica,
        name="engine",
        max_ongoing_requests=engine.slots + engine.max_waiting + _OTHER_CALLS,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=replicas.drain_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        **options,
    )
    ingress: Any = serve.ingress()(Ingress)
    front: Any = serve.deployment(
        ingress,
        name="ingress",
        max_ongoing_requests=100_000,  # its own admission refuses long before
        ray_actor_options={"num_cpus": 0.1},
        graceful_shutdown_timeout_s=replicas.drain_seconds,
        graceful_shutdown_wait_loop_s=0.2,
    )
    needs_keys = server.http.is_public or bool(read_keys(server.http.api_keys_file))
    return front.bind(plain, needs_keys, denoising.bind(plain))


def rendered(server: Server) -> dict[str, Any]:
    """A config for `serve deploy` and KubeRay's RayService."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": server.http.host, "port": server.http.port},
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": "dlm_ray.runtime.serve:application",
                "args": server.model_dump(mode="json", exclude_defaults=True),
            }
        ],
    }


def start(server: Server) -> str:
    """Deploys the service on the connected cluster and waits until it answers; returns its URL.

    Raises:
        UserError: if the address is taken, or the cluster is too small.
    """
    http, replicas = server.http, server.replicas
    _check_port(http.host, http.port)
    least = replicas.autoscaling.min_replicas if replicas.autoscaling is not None else replicas.count
    available = ray.cluster_resources()
    for kind, each in (("CPU", replicas.cpus), ("GPU", replicas.gpus)):
        needed = replicas.shards * each
        if least * needed + (0.1 if kind == "CPU" else 0) > available.get(kind, 0.0):
            raise UserError(
                f"{least} replicas of {needed:g} {kind}s and an ingress need more than the cluster's {available.get(kind, 0.0):g}; lower "
                f"replicas.count or replicas.{kind.lower()}s"
            )
    serve.start(http_options=serve.HTTPOptions(host=http.host, port=http.port, request_timeout_s=None), proxy_location="HeadOnly")
    try:
        serve.run(application(server.model_dump(mode="json")), name=APPLICATION, route_prefix="/")
    except (RuntimeError, RayServeException) as error:
        status = serve.status().applications.get(APPLICATION)
        found = [one.message for one in status.deployments.values() if one.message] if status else []
        raise UserError(f"the service did not come up: {' '.join(found)[-2000:] or error}") from error
    host = f"[{http.host}]" if ":" in http.host else http.host
    return f"http://{host}:{http.port}"


def stop() -> None:
    """Takes no request any more, finishes those that were accepted, and ends."""
    serve.delete(APPLICATION)
    serve.shutdown()


def run(server: Server, on_ready: Callable[[str], None]) -> None:
    """The service until SIGINT or SIGTERM, on a cluster of its own or RAY_ADDRESS's.

    Raises:
        UserError: if it would be open to others than this machine.
    """
    if server.http.is_public and not read_keys(server.http.api_keys_file):
        raise UserError(
            f"http.host={server.http.host} is reached from outside, and there is no API key; set DLM_RAY_API_KEYS or --api-keys-file, or use "
            "--host 127.0.0.1"
        )
    asked = threading.Event()
    with cluster.session():
        url = start(server)
        before = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            on_ready(url)
            while not asked.wait(0.5):
                pass
        finally:
            stop()
            for number, handler in before.items():
                signal.signal(number, handler)


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"{host}:{port} cannot be listened at ({os.strerror(error.errno or 0)}); choose another --host or --port"
            ) from error


def _log_to_the_replica() -> None:
    """Every request's line goes to the process's log, with its id."""
    own = logging.getLogger("dlm_ray.serving")
    own.setLevel(logging.INFO)
