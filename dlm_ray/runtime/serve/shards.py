"""The processes of a replica whose network is sharded: the replica leads, and starts the others as actors in the bundles of its placement group."""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dlm_ray.config.server import Server
from dlm_ray.generation.loading import load_network, pick_device
from dlm_ray.serving import sharding

log = logging.getLogger("dlm_ray.serving")


class Follower:
    """Holds one shard."""

    def __init__(self, server: dict[str, Any], rank: int):
        self._server, self._rank = Server.model_validate(server), rank

    def start(self) -> None:
        """Returns when the actor is there."""

    def hold(self, port: int) -> None:
        """Until the replica stops; raises RuntimeError when it is lost."""
        server = self._server
        [own] = server.served
        group = sharding.join(self._rank, server.replicas.shards, port, pick_device(server.device))
        try:
            sharding.follow(group, load_network(own.checkpoint, own.weights, device=server.device, mesh=group.mesh))
        finally:
            sharding.leave()


class Shards:
    """A sharded replica's side: the followers, and the group that it leads."""

    def __init__(self, server: Server):
        """Starts the followers, which load then.

        Args:
            server: of one model, whose checkpoint is a step, so that all load the same.
        """
        replicas, bundles = server.replicas, ray.util.get_current_placement_group()
        assert bundles is not None, "Serve starts a sharded replica in a placement group"
        self._followers: list[Any] = [
            ray.remote(Follower)
            .options(
                num_cpus=replicas.cpus,
                num_gpus=replicas.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(bundles, placement_group_bundle_index=rank),
            )
            .remote(server.model_dump(mode="json"), rank)
            for rank in range(1, replicas.shards)
        ]
        ray.get([follower.start.remote() for follower in self._followers])
        store = sharding.meeting_place()
        self._held = [follower.hold.remote(store.port) for follower in self._followers]
        self.group = sharding.join(0, replicas.shards, store, pick_device(server.device))

    def watch(self) -> None:
        """From here on, when a follower ends, this process ends, too: Serve sees that at once, and starts another replica."""
        for held in self._held:
            held.future().add_done_callback(_end)


def _end(held: Future[None]) -> None:
    log.error("a process that holds a part of the network has ended; this replica ends, too", exc_info=held.exception())
    os._exit(1)
