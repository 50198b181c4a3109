"""The Ray cluster that a command uses: the one that RAY_ADDRESS names, or one of its own on this machine for as long as it runs."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

# Ray reads these when it is imported. Usage reports are off: nobody asked for them.
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
    """A Ray cluster within the context: one that is connected already, RAY_ADDRESS's, or a local one that ends with the context.

    Raises:
        UserError: if no cluster answers at RAY_ADDRESS.
    """
    for chatty in ("ray.data", "ray.train"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
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


def _start() -> None:
    """A cluster on this machine, whose processes know it by its address.

    Without one they look for a cluster by themselves, and with another beside it on the machine find two: Ray Train then leaks placement groups.
    """
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    os.environ["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"
    try:
        # The dashboard stays on: Ray Train asks its State API whether a controller has died, and leaks placement groups without an answer.
        ray.init(
            address="local",
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            object_store_memory=256 * 2**20,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except BaseException:
        del os.environ["RAY_ADDRESS"]
        raise
    finally:
        del os.environ["RAY_GCS_SERVER_PORT"]


@contextmanager
def running() -> Iterator[None]:
    """A Ray cluster that is there already: one that is connected, RAY_ADDRESS's, or the one of this machine.

    Raises:
        UserError: if there is none, or one cannot be told from another.
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
    """What another process has to have in its environment to find the connected cluster.

    Ray asks for a token in a cluster that it starts itself, and brings none to one that is named by its address unless it is told to.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    return {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} | ({"RAY_AUTH_MODE": mode} if mode else {})


def _connect(address: str) -> None:
    """Raises UserError if no cluster answers there, or several may be meant; and at once if nothing does, where Ray would try again for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    other = "give HOST:PORT of a cluster's head, or unset it for the one of this machine"
    if address not in ("auto", "local"):
        if not (colon and host and port.isdecimal()):
            raise UserError(f"RAY_ADDRESS={address} is no address; {other}")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"RAY_ADDRESS={address}: nothing answers there ({error}); {other}") from error
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, AuthenticationError) as error:
        where = "on this machine, or too many" if address == "auto" else f"at RAY_ADDRESS={address}"
        raise UserError(
            f"no Ray cluster was found {where} ({error}); RAY_ADDRESS names one, and with RAY_AUTH_MODE=token the token of this machine is "
            "shown to it"
        ) from error


def check_fits(parallelism: Parallelism) -> None:
    """Raises UserError if the (fewest) workers ask for more than the connected cluster has; Ray would wait for it for ever."""
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    workers = parallelism.fewest_workers
    needed = workers * parallelism.cpus_per_worker
    if needed > cpus:
        raise UserError(
            f"parallelism.workers={workers} with parallelism.cpus_per_worker={parallelism.cpus_per_worker:g} need {needed:g} CPUs, "
            f"and the cluster has {cpus:g}; set parallelism.workers to at most {int(cpus // parallelism.cpus_per_worker)}, or lower "
            "parallelism.cpus_per_worker"
        )
    if parallelism.device == "cuda" and workers > gpus:
        raise UserError(
            f"parallelism.workers={workers} with parallelism.device=cuda need as many GPUs, and the cluster has {gpus:g}; lower "
            "parallelism.workers or set parallelism.device=cpu"
        )
