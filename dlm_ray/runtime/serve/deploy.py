"""The service on Ray Serve: its application, its start and stop, and the replacement of a running one."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dlm_ray.runtime import cluster  # imported first: it sets the variables that Ray reads when it is imported

# isort: split
import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from dlm_ray.config.errors import UserError
from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.server import Server
from dlm_ray.config.server_file import read_keys, validate_server
from dlm_ray.runtime.serve.replicas import Ingress, Replica
from dlm_ray.serving.pinning import pinned

APPLICATION = "dlm_ray"
# Calls of a replica that generate nothing: descriptions, scores, health checks.
_OTHER_CALLS = 16
_INGRESS_CPUS = 0.1


def application(args: JsonObject) -> serve.Application:
    """Return the application of a service's configuration; `import_path` of a Serve configuration names this function.

    Raises:
        UserError: if the configuration is invalid or a checkpoint does not exist.
    """
    server = pinned(validate_server(args, APPLICATION))
    config = server.model_dump(mode="json")
    # A new replica must work before the one that it replaces stops accepting requests; that one finishes what it has.
    shutdown: JsonObject = {
        "graceful_shutdown_timeout_s": server.drain_seconds,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_surge_percent": 100,
    }
    engine: Any = serve.deployment(
        Replica,
        name="engine",
        max_ongoing_requests=server.models_at_once * (server.engine.slots + server.engine.max_waiting) + _OTHER_CALLS,
        ray_actor_options={"num_cpus": server.replicas.cpus, "num_gpus": server.replicas.gpus},
        health_check_period_s=2,
        **shutdown,
        **_scaling(server),
    )
    ingress_class: Any = serve.ingress()(Ingress)
    ingress: Any = serve.deployment(
        ingress_class,
        name="ingress",
        max_ongoing_requests=100_000,  # its own admission refuses requests long before
        ray_actor_options={"num_cpus": _INGRESS_CPUS},
        **shutdown,
    )
    needs_keys = server.http.is_public or bool(read_keys(server.http.api_keys_file))
    bound: serve.Application = ingress.bind(config, needs_keys, engine.bind(config))
    return bound


def _scaling(server: Server) -> JsonObject:
    """Return Serve's options for the number of replicas and for the shards of each."""
    replicas, scaling = server.replicas, server.replicas.autoscaling
    options: JsonObject = {"num_replicas": replicas.count}
    if scaling is not None:
        options = {
            "autoscaling_config": {
                "min_replicas": scaling.min_replicas,
                "max_replicas": scaling.max_replicas,
                "target_ongoing_requests": scaling.target_requests or server.engine.slots,
                "upscale_delay_s": scaling.upscale_delay_seconds,
                "downscale_delay_s": scaling.downscale_delay_seconds,
            }
        }
    if replicas.shards > 1:  # the shards' actors are in the replica's placement group and die with it
        each = {"CPU": replicas.cpus, "GPU": replicas.gpus}
        options |= {"placement_group_bundles": [each] * replicas.shards, "placement_group_strategy": "STRICT_PACK"}
    return options


def rendered(server: Server) -> JsonObject:
    """Return a configuration for `serve deploy` and for KubeRay's RayService."""
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
    """Deploy the service on the connected cluster, wait until it answers, and return its URL.

    Raises:
        UserError: if a checkpoint does not exist, the address is taken, or the cluster is too small.
    """
    http, replicas = server.http, server.replicas
    server = pinned(server)
    _check_port(http.host, http.port)
    fewest = replicas.autoscaling.min_replicas if replicas.autoscaling is not None else replicas.count
    _check_room(server, fewest, cluster.resources(), "the cluster's")
    serve.start(
        http_options=serve.HTTPOptions(host=http.host, port=http.port, request_timeout_s=None),
        proxy_location="HeadOnly",
    )
    _deploy(server)
    return _url(server)


def replace(server: Server) -> str:
    """Replace the service that runs on the connected cluster, without failing a request, and return its URL.

    New replicas load while the old ones serve. As soon as a new one answers, an old one stops accepting requests and
    finishes those that it has. The function returns when all old replicas are gone.

    Raises:
        UserError: if no service runs there, its address would change, there is no room for a new replica, or the new
            service does not start; then the old one continues unchanged.
    """
    server = pinned(server)
    if APPLICATION not in serve.status().applications:
        raise UserError("no service of dlm_ray runs on this cluster (RAY_ADDRESS selects another one); start one first")
    before = Server.model_validate(serve.get_app_handle(APPLICATION).settings.remote().result(timeout_s=60))
    if (server.http.host, server.http.port) != (before.http.host, before.http.port):
        raise UserError(
            f"http.host={server.http.host} and http.port={server.http.port}: the service runs at "
            f"{before.http.host}:{before.http.port}, and an address cannot be changed without a pause; keep it, or "
            "start another service"
        )
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]  # Ray does not annotate it
    _check_room(server, 1, free, "the resources that the running service leaves free,")
    try:
        _deploy(server)
    except UserError as error:
        _deploy(before)
        raise UserError(f"the old service continues unchanged: {error}") from error
    return _url(server)


def replace_running(server: Server) -> str:
    """Call `replace` on the cluster that is running, and return the service's URL."""
    with cluster.running():
        return replace(server)


def stop() -> None:
    """Stop accepting requests, finish the accepted ones, and shut the service down."""
    serve.delete(APPLICATION)
    serve.shutdown()  # type: ignore[no-untyped-call]  # Ray does not annotate it


def run(server: Server, on_ready: Callable[[str, dict[str, str]], None]) -> None:
    """Run the service until SIGINT or SIGTERM, on its own cluster or the one at RAY_ADDRESS.

    Args:
        server: the configuration.
        on_ready: called with the URL and `cluster.environment()` once the service answers.

    Raises:
        UserError: if the service would be public without an API key, or cannot start.
    """
    if server.http.is_public and not read_keys(server.http.api_keys_file):
        raise UserError(
            f"http.host={server.http.host} is reachable from other machines, and there is no API key; set "
            "DLM_RAY_API_KEYS or http.api_keys_file, or http.host=127.0.0.1"
        )
    server = pinned(server)
    with cluster.session():
        url = start(server)
        with _stop_signals() as stopped:
            try:
                on_ready(url, cluster.environment())
                while not stopped.wait(0.5):
                    pass
            finally:
                stop()


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set an event on SIGINT or SIGTERM within the context, instead of their usual effect."""
    event = threading.Event()
    before = {number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _deploy(server: Server) -> None:
    """Deploy the application and wait until it runs.

    Raises:
        UserError: if it does not start, with Serve's reasons.
    """
    try:
        serve.run(application(server.model_dump(mode="json")), name=APPLICATION, route_prefix="/")
    except (RuntimeError, RayServeException) as error:
        status = serve.status().applications.get(APPLICATION)
        reasons = [one.message for one in status.deployments.values() if one.message] if status else []
        raise UserError(f"the service did not start: {' '.join(reasons)[-2000:] or error}") from error


def _url(server: Server) -> str:
    host = f"[{server.http.host}]" if ":" in server.http.host else server.http.host
    return f"http://{host}:{server.http.port}"


def _check_room(server: Server, count: int, resources: dict[str, float], owner: str) -> None:
    """Check that replicas and an ingress fit the resources; Ray would wait for them for ever.

    Args:
        server: the configuration.
        count: replicas.
        resources: of the cluster, by kind.
        owner: how the message names the resources.

    Raises:
        UserError: if they do not fit.
    """
    for kind, per_shard in (("CPU", server.replicas.cpus), ("GPU", server.replicas.gpus)):
        each = server.replicas.shards * per_shard
        if count * each + (_INGRESS_CPUS if kind == "CPU" else 0) > resources.get(kind, 0.0):
            raise UserError(
                f"{count} replicas of {each:g} {kind}s and an ingress need more than {owner} "
                f"{resources.get(kind, 0.0):g}; lower replicas.count or replicas.{kind.lower()}s"
            )


def _check_port(host: str, port: int) -> None:
    """Check that the address can be listened on.

    Raises:
        UserError: if it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise UserError(
                f"cannot listen on http.host={host}, http.port={port} ({reason}); choose another host or port"
            ) from error
