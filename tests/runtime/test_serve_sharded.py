"""A replica on two processes on Ray Serve: the texts of one, an end of the whole replica when a part is lost, and nothing that stays."""

import asyncio
import os
import signal

import httpx
import pytest
from helpers import service
from helpers.processes import free_port, until

from dlm_ray.config.errors import UserError
from dlm_ray.config.server import Server

pytestmark = pytest.mark.ray
ASKED = {"model": "tiny", "prompt": "the model", "max_tokens": 30, "seed": 7}


def test_two_processes_serve_the_text_of_one_and_end_together(ray_session, data_folder, tmp_path):
    import ray
    from ray.util.state import list_actors, list_placement_groups

    from dlm_ray.runtime.serve import deploy as runtime

    own_cluster = ray.get_runtime_context().gcs_address

    def processes(part):
        alive = list_actors(own_cluster, filters=[("state", "=", "ALIVE")], limit=1000)
        return [actor.pid for actor in alive if part in (actor.name or "") or part == actor.class_name]

    checkpoint = service.train(data_folder, tmp_path, "block8") / "block8"
    port = free_port()
    server = Server(
        checkpoint=str(checkpoint),
        name="tiny",
        http={"port": port},
        replicas={"shards": 2, "cpus": 0.5, "drain_seconds": 5},
    )
    too_many = server.model_copy(update={"replicas": server.replicas.model_copy(update={"shards": 9, "cpus": 2.0})})
    with pytest.raises(UserError, match="1 replicas of 18 CPUs"):
        runtime.start(too_many)
    url = runtime.start(server)
    try:
        answer = httpx.post(f"{url}/v1/completions", json=ASKED, timeout=60)
        with service.hosted(checkpoint) as (_, app):
            alone = asyncio.run(service.client(app).post("/v1/completions", json=ASKED))
        assert answer.json()["choices"] == alone.json()["choices"]
        [leader], [follower] = processes("#engine#"), processes("Follower")
        os.kill(follower, signal.SIGKILL)
        until(lambda: leader not in processes("#engine#"), seconds=10)
    finally:
        runtime.stop()
    until(lambda: not (processes("#engine#") or processes("Follower")), seconds=20)
    until(lambda: {group.state for group in list_placement_groups(own_cluster)} <= {"REMOVED"}, seconds=20)
