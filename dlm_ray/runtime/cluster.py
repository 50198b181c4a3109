"""The Ray cluster of a command: the one that RAY_ADDRESS names, or a local one for the duration of the command."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

# Ray reads these variables when it is imported. Usage reports are off by default.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray  # noqa: E402
from ray.exceptions import AuthenticationError  # noqa: E402

from dlm_ray.config.errors import UserError  # noqa: E402
from dlm_ray.config.recipe import Parallelism  # noqa: E402


@contextmanager
def session() -> Iterator[None]:
    """Connect to a Ray cluster within the context.

    It is the one that is connected already, the one at RAY_ADDRESS, or a local one that ends with the context.

    Raises:
        UserError: if no cluster answers at RAY_ADDRESS.
    """
    for logger in ("ray.data", "ray.train"):
        logging.getLogger(logger).setLevel(_ray_log_level())
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _connect(address)
    else:
        _start()
    try:
        yield
    finally:
        ray.shutdown()
        if not address:
            os.environ.pop("RAY_ADDRESS", None)


def _is_debugging() -> bool:
    """Return whether the user wants Ray's own messages: the logger `dlm_ray` has level DEBUG, as with --debug."""
    return logging.getLogger("dlm_ray").isEnabledFor(logging.DEBUG)


def _ray_log_level() -> int:
    return logging.INFO if _is_debugging() else logging.ERROR


def _start() -> None:
    """Start a cluster on this machine whose processes know its address.

    Without an address they would search for a cluster, and find two if another one runs on the machine; Ray Train then
    leaks placement groups.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    node: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray does not annotate it
    os.environ["RAY_ADDRESS"] = f"{node}:{port}"
    try:
        # Ray Train asks the dashboard's State API whether a controller has died, and leaks placement groups without it.
        ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            object_store_memory=256 * 2**20,
            log_to_driver=_is_debugging(),
            logging_level=_ray_log_level(),
        )
    except BaseException:
        del os.environ["RAY_ADDRESS"]
        raise
    finally:
        del os.environ["RAY_GCS_SERVER_PORT"]


@contextmanager
def running() -> Iterator[None]:
    """Connect to a Ray cluster that exists: a connected one, the one at RAY_ADDRESS, or the one on this machine.

    Raises:
        UserError: if there is none, or more than one on this machine.
    """
    if ray.is_initialized():
        yield
        return
    _connect(os.environ.get("RAY_ADDRESS") or "auto")
    try:
        yield
    finally:
        ray.shutdown()


def environment() -> dict[str, str]:
    """Return the environment variables with which another process finds the connected cluster.

    Ray requires a token in a cluster that it starts itself, and sends one to a cluster given by address only if told.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} | ({"RAY_AUTH_MODE": mode} if mode else {})


def _connect(address: str) -> None:
    """Connect to the cluster at an address.

    Raises:
        UserError: if no cluster answers there, at once, where Ray would retry for minutes; or if several are found.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    fix = "set it to HOST:PORT of a cluster's head, or unset it to use this machine's cluster"
    if address not in ("auto", "local"):
        if not (colon and host and port.isdecimal()):
            raise UserError(f"RAY_ADDRESS={address} is not an address; {fix}")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"RAY_ADDRESS={address}: nothing answers there ({error}); {fix}") from error
    try:
        ray.init(address=address, log_to_driver=_is_debugging(), logging_level=_ray_log_level())
    except (ConnectionError, AuthenticationError) as error:
        where = "on this machine, or more than one" if address == "auto" else f"at RAY_ADDRESS={address}"
        raise UserError(
            f"no Ray cluster was found {where} ({error}); set RAY_ADDRESS to select one, and RAY_AUTH_MODE=token to "
            "send it this machine's token"
        ) from error


def resources() -> dict[str, float]:
    """Return the resources of the connected cluster, by kind."""
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray does not annotate it
    return total


def check_fits(parallelism: Parallelism) -> None:
    """Check that the connected cluster has the resources of the fewest workers; Ray would wait for them for ever.

    Raises:
        UserError: if it does not.
    """
    available = resources()
    cpus, gpus = available.get("CPU", 0.0), available.get("GPU", 0.0)
    workers = parallelism.fewest_workers
    needed = workers * parallelism.cpus_per_worker
    if needed > cpus:
        raise UserError(
            f"parallelism.workers={workers} with parallelism.cpus_per_worker={parallelism.cpus_per_worker:g} need "
            f"{needed:g} CPUs, and the cluster has {cpus:g}; set parallelism.workers to at most "
            f"{int(cpus // parallelism.cpus_per_worker)}, or lower parallelism.cpus_per_worker"
        )
    if parallelism.device == "cuda" and workers > gpus:
        raise UserError(
            f"parallelism.workers={workers} with parallelism.device=cuda need as many GPUs, and the cluster has "
            f"{gpus:g}; lower parallelism.workers or set parallelism.device=cpu"
        )
