"""A replica on two processes on Ray Serve.

The texts of one, an end of both when one is lost, and nothing that stays.
"""

import asyncio
import os
import signal

import httpx
import pytest
from helpers import service
from helpers.processes import until

from dlm_ray.config.errors import UserError

pytestmark = pytest.mark.ray
ASKED = {"model": "tiny", "prompt": "the model", "max_tokens": 30, "seed": 7}


def test_two_processes_serve_the_text_of_one_and_end_together(deployment):
    import ray
    from ray.util.state import list_actors, list_placement_groups

    from dlm_ray.runtime.serve import deploy

    own_cluster = ray.get_runtime_context().gcs_address

    def processes(part):
        alive = list_actors(own_cluster, filters=[("state", "=", "ALIVE")], limit=1000)
        return [actor.pid for actor in alive if part in (actor.name or "") or part == actor.class_name]

    with pytest.raises(UserError, match="1 replicas of 18 CPUs"):
        deploy.start(deployment.settings(replicas={"shards": 9, "cpus": 2.0}))
    url = deployment.use(replicas={"shards": 2, "cpus": 0.5, "drain_seconds": 5})
    answer = httpx.post(f"{url}/v1/completions", json=ASKED, timeout=60)
    with service.hosted(deployment.runs / "block8") as (_, app):
        alone = asyncio.run(service.client(app).post("/v1/completions", json=ASKED))
    assert answer.json()["choices"] == alone.json()["choices"]
    [leader], [follower] = processes("#engine#"), processes("Follower")
    os.kill(follower, signal.SIGKILL)
    until(lambda: leader not in processes("#engine#"), seconds=10)
    deployment.stop()
    until(lambda: not (processes("#engine#") or processes("Follower")), seconds=20)
    until(lambda: {group.state for group in list_placement_groups(own_cluster)} <= {"REMOVED"}, seconds=20)
