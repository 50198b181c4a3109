"""The service on Ray Serve: its application, its start and end, and its change to other settings or another checkpoint without a pause."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

from dlm_ray.runtime import cluster  # before Ray: it sets what Ray reads when it is imported

# isort: split
import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from dlm_ray.config.errors import UserError
from dlm_ray.config.server import Server
from dlm_ray.config.server_file import check, read_keys
from dlm_ray.runtime.serve.replicas import Ingress, Replica
from dlm_ray.serving.pinning import pinned

APPLICATION = "dlm_ray"
# Calls of a replica that are no texts: cards, scores, health.
_OTHER_CALLS = 16
_INGRESS_CPUS = 0.1


def application(args: dict[str, Any]) -> serve.Application:
    """The application of a server file's content; what `import_path` of a Serve config names.

    Raises:
        UserError: if it contradicts itself, or a checkpoint is not there.
    """
    server = Server.model_validate(args)
    check(server, APPLICATION)
    server = pinned(server)
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
    # Whatever replaces a replica works before the one that is replaced takes no request any more; that one finishes what it has.
    ending: Any = {
        "graceful_shutdown_timeout_s": server.drain_seconds,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_surge_percent": 100,
    }
    each = {"CPU": replicas.cpus, "GPU": replicas.gpus}
    if replicas.shards > 1:  # they die with the replica, to whose placement group they belong
        options |= {"placement_group_bundles": [each] * replicas.shards, "placement_group_strategy": "STRICT_PACK"}
    denoising: Any = serve.deployment(
        Replica,
        name="engine",
        max_ongoing_requests=server.models_at_once * (engine.slots + engine.max_waiting) + _OTHER_CALLS,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        health_check_period_s=2,
        **ending,
        **options,
    )
    ingress: Any = serve.ingress()(Ingress)
    front: Any = serve.deployment(
        ingress,
        name="ingress",
        max_ongoing_requests=100_000,  # its own admission refuses long before
        ray_actor_options={"num_cpus": _INGRESS_CPUS},
        **ending,
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
                "import_path": "dlm_ray.runtime.serve.deploy:application",
                "args": server.model_dump(mode="json", exclude_defaults=True),
            }
        ],
    }


def start(server: Server) -> str:
    """Deploys the service on the connected cluster and waits until it answers; returns its URL.

    Raises:
        UserError: if a checkpoint is not there, the address is taken, or the cluster is too small.
    """
    http, replicas = server.http, server.replicas
    server = pinned(server)
    _check_port(http.host, http.port)
    least = replicas.autoscaling.min_replicas if replicas.autoscaling is not None else replicas.count
    _check_room(server, least, ray.cluster_resources(), "the cluster's")
    serve.start(
        http_options=serve.HTTPOptions(host=http.host, port=http.port, request_timeout_s=None),
        proxy_location="HeadOnly",
    )
    _deploy(server)
    return _url(server)


def replace(server: Server) -> str:
    """The service that runs on the connected cluster goes over to other settings or another checkpoint, and no request fails; returns its URL.

    New replicas load beside the old ones; as soon as one answers, an old one takes no request any more and finishes what it has. Returns when all
    old ones are gone.

    Raises:
        UserError: if none runs there, its address would be another, there is no room beside it, or the new one does not come up; then the
            old one goes on as it was.
    """
    server = pinned(server)
    if APPLICATION not in serve.status().applications:
        raise UserError(
            "no service of dlm_ray runs on this cluster (RAY_ADDRESS names another one); leave --replace out to start one"
        )
    before = Server.model_validate(serve.get_app_handle(APPLICATION).settings.remote().result(timeout_s=60))
    if (server.http.host, server.http.port) != (before.http.host, before.http.port):
        raise UserError(
            f"http.host={server.http.host} and http.port={server.http.port}: the service runs at {before.http.host}:{before.http.port}, and an "
            "address cannot be changed without a pause; keep it, or start another service"
        )
    _check_room(server, 1, ray.available_resources(), "what is free beside the service that runs, ")
    try:
        _deploy(server)
    except UserError as error:
        _deploy(before)
        raise UserError(f"the old service goes on as it was: {error}") from error
    return _url(server)


def replace_running(server: Server) -> str:
    """`replace` on the cluster that runs already."""
    with cluster.running():
        return replace(server)


def stop() -> None:
    """Takes no request any more, finishes those that were accepted, and ends."""
    serve.delete(APPLICATION)
    serve.shutdown()


def run(server: Server, on_ready: Callable[[str, dict[str, str]], None]) -> None:
    """The service until SIGINT or SIGTERM, on a cluster of its own or RAY_ADDRESS's; `on_ready` is told its URL and `cluster.environment`.

    Raises:
        UserError: if it would be open to others than this machine.
    """
    if server.http.is_public and not read_keys(server.http.api_keys_file):
        raise UserError(
            f"http.host={server.http.host} is reached from outside, and there is no API key; set DLM_RAY_API_KEYS or --api-keys-file, or use "
            "--host 127.0.0.1"
        )
    server = pinned(server)
    asked = threading.Event()
    with cluster.session():
        url = start(server)
        before = {number: signal.signal(number, lambda *_: asked.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            on_ready(url, cluster.environment())
            while not asked.wait(0.5):
                pass
        finally:
            stop()
            for number, handler in before.items():
                signal.signal(number, handler)


def _deploy(server: Server) -> None:
    try:
        serve.run(application(server.model_dump(mode="json")), name=APPLICATION, route_prefix="/")
    except (RuntimeError, RayServeException) as error:
        status = serve.status().applications.get(APPLICATION)
        found = [one.message for one in status.deployments.values() if one.message] if status else []
        raise UserError(f"the service did not come up: {' '.join(found)[-2000:] or error}") from error


def _url(server: Server) -> str:
    host = f"[{server.http.host}]" if ":" in server.http.host else server.http.host
    return f"http://{host}:{server.http.port}"


def _check_room(server: Server, count: int, resources: dict[str, float], whose: str) -> None:
    """Raises UserError if so many replicas and an ingress need more than that; Ray would wait for it for ever."""
    for kind, of_a_shard in (("CPU", server.replicas.cpus), ("GPU", server.replicas.gpus)):
        each = server.replicas.shards * of_a_shard
        if count * each + (_INGRESS_CPUS if kind == "CPU" else 0) > resources.get(kind, 0.0):
            raise UserError(
                f"{count} replicas of {each:g} {kind}s and an ingress need more than {whose} {resources.get(kind, 0.0):g}; lower "
                f"replicas.count or replicas.{kind.lower()}s"
            )


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
