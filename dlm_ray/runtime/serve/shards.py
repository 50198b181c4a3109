"""The processes of a sharded replica: the replica leads, and starts followers as actors in its placement group."""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.server import Server
from dlm_ray.generation.loading import load_network
from dlm_ray.models.device import pick_device
from dlm_ray.serving import sharding

log = logging.getLogger("dlm_ray.serving")


class Follower:
    """An actor that holds one shard of the network."""

    def __init__(self, server: JsonObject, rank: int):
        self._server, self._rank = Server.model_validate(server), rank

    def start(self) -> None:
        """Return once the actor exists."""

    def hold(self, port: int) -> None:
        """Hold the shard until the replica stops; raises RuntimeError if the replica is lost.

        Args:
            port: of the replica's rendezvous store.
        """
        server = self._server
        [model] = server.served
        group = sharding.join(self._rank, server.replicas.shards, port, pick_device(server.device))
        try:
            sharding.follow(group, load_network(model.checkpoint, model.weights, device=server.device, mesh=group.mesh))
        finally:
            sharding.leave()


class Shards:
    """The followers of a sharded replica, and the process group that the replica leads."""

    def __init__(self, server: Server):
        """Start the followers, which then load their shards.

        Args:
            server: configuration of one model, whose checkpoint is a step directory, so that all shards load the same.
        """
        replicas, placement_group = server.replicas, ray.util.get_current_placement_group()
        assert placement_group is not None, "Serve starts a sharded replica in a placement group"
        self._followers: list[Any] = [
            ray.remote(Follower)
            .options(
                num_cpus=replicas.cpus,
                num_gpus=replicas.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group, placement_group_bundle_index=rank
                ),
            )
            .remote(server.model_dump(mode="json"), rank)
            for rank in range(1, replicas.shards)
        ]
        ray.get([follower.start.remote() for follower in self._followers])
        store = sharding.create_store()
        self._holding = [follower.hold.remote(store.port) for follower in self._followers]
        self.group = sharding.join(0, replicas.shards, store, pick_device(server.device))

    def watch(self) -> None:
        """End this process when a follower ends; Serve sees that at once and starts another replica."""
        for holding in self._holding:
            holding.future().add_done_callback(_exit)


def _exit(holding: Future[None]) -> None:
    log.error(
        "a process that holds a shard of the network has ended; this replica ends, too", exc_info=holding.exception()
    )
    os._exit(1)
