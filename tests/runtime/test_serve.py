"""The service on Ray Serve: OpenAI's client, company, a client that leaves, a replica that is killed, and an end that finishes what was accepted."""

import importlib
import os
import re
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from helpers import service
from helpers.processes import free_port, until

from dlm_ray.config.errors import UserError
from dlm_ray.config.server import Server

pytestmark = pytest.mark.ray
SHIPPED = Path(__file__).parent.parent.parent / "configs/serve"
PROMPTS = ("a", "the", "row", "the model")  # at temperature 0 their texts have no end


@pytest.fixture(scope="module")
def served(ray_session, data_folder, tmp_path_factory):
    """(url, redeploy, checkpoint) of one replica; `redeploy(count)` changes how many there are."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    from dlm_ray.runtime.serve import deploy as runtime

    folder = service.train(data_folder, tmp_path_factory.mktemp("served"), "block8")
    port = free_port()

    def server(count):
        return Server(
            checkpoint=str(folder / "block8"),
            name="tiny",
            engine={"slots": 32, "batch_invariant": True},
            limits={"output_tokens": 200_000},
            http={"port": port},
            replicas={"count": count, "cpus": 0.2, "drain_seconds": 30},
        )

    def redeploy(count):
        serve.run(
            runtime.application(server(count).model_dump(mode="json")), name=runtime.APPLICATION, route_prefix="/"
        )

    url = runtime.start(server(1))
    with pytest.raises(UserError, match="cannot be listened at"):
        runtime.start(server(1))
    yield url, redeploy, folder / "block8"
    with suppress(RayServeException):  # a test has ended it
        runtime.stop()


def test_openais_client_gets_the_same_text_alone_streamed_and_among_31_others(served):
    url, _, _ = served
    own = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    asked = {"model": "tiny", "prompt": "the model", "max_tokens": 30, "seed": 7}
    whole = own.completions.create(**asked)
    # It may write its end before.
    assert (whole.usage.completion_tokens == 30) == (
        whole.choices[0].finish_reason == "length"
    ) and whole.usage.network_calls["denoising"] > 0
    chunks = list(own.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text and len(chunks) > 2

    def other(number):
        return (
            own.completions.create(model="tiny", prompt="a row " * (number % 3), max_tokens=10 + number, seed=number)
            .choices[0]
            .text
        )

    with ThreadPoolExecutor(32) as clients:
        others = [clients.submit(other, number) for number in range(31)]
        among = clients.submit(lambda: own.completions.create(**asked)).result()
        assert len({one.result() for one in others}) > 25
    assert among.choices[0].text == whole.choices[0].text
    answer = httpx.get(f"{url}/v1/models")
    assert len(answer.headers.get_list("x-request-id")) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_frees_its_slot_within_a_second(served, stream):
    url, _, _ = served

    def active():
        return httpx.get(f"{url}/v1/models").json()["data"][0]["load"]["active"]

    body = {"model": "tiny", "prompt": "the model", "max_tokens": 200_000, "temperature": 0, "stream": stream}
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as line:
        content = httpx.Request("POST", url, json=body).content
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        line.sendall(head.encode() + content)
        until(lambda: active() == 1)
    assert until(lambda: active() == 0) < 1.0


def test_a_replica_killed_under_load_costs_no_whole_answer_and_ends_streams_with_an_error(served):
    import ray
    from ray.util.state import list_actors

    url, redeploy, _ = served
    redeploy(2)
    # One longer than what was there before: the new one has to answer, too.
    own_cluster = ray.get_runtime_context().gcs_address
    alive = list_actors(own_cluster, filters=[("state", "=", "ALIVE")], limit=1000)
    engines = [actor for actor in alive if "#engine#" in (actor.name or "")]
    assert len(engines) == 2
    stop_asking = threading.Event()
    own = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)

    texts = [[] for _ in range(6)]

    def whole(number):
        while not stop_asking.is_set():
            asked = {"model": "tiny", "prompt": "the model", "max_tokens": 60, "seed": number}
            texts[number].append(own.completions.create(**asked).choices[0].text)

    def wait_for(num_texts):
        until(lambda: min(map(len, texts)) >= num_texts, 60)

    def streamed(number):
        try:
            asked = {"model": "tiny", "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 100_000, "temperature": 0}
            with own.completions.create(**asked, stream=True, timeout=60) as events:
                for _ in events:
                    if stop_asking.is_set():
                        return "stopped"
        except openai.APIError as error:
            return error.body["code"]
        return "finished"

    with ThreadPoolExecutor(16) as clients:
        streams = [
            clients.submit(streamed, number) for number in range(10)
        ]  # so many that not all of them miss the one that is killed
        asking = [clients.submit(whole, number) for number in range(6)]
        wait_for(2)
        os.kill(engines[0].pid, signal.SIGKILL)
        wait_for(2 + max(map(len, texts)))
        stop_asking.set()
        for one in asking:
            one.result()  # none failed
        ends = [one.result() for one in streams]
    assert [len(set(own)) for own in texts] == [1] * 6, "each was the same text, before and after"
    assert "replica_lost" in ends and set(ends) <= {"replica_lost", "stopped"}


def test_the_end_finishes_what_was_accepted(served):
    from dlm_ray.runtime.serve import deploy as runtime

    url, _, _ = served

    def num_texts():
        return int(re.search(r"texts_under_way (\d+)", httpx.get(f"{url}/metrics").text)[1])

    until(lambda: num_texts() == 0)
    with ThreadPoolExecutor(1) as clients:
        body = {"model": "tiny", "prompt": "the model", "max_tokens": 400, "temperature": 0}
        answer = clients.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
        until(lambda: num_texts() == 1 or answer.done())
        assert not answer.done(), answer.result().text
        runtime.stop()
        assert answer.result().status_code == 200
        assert answer.result().json()["usage"]["completion_tokens"] == 400
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_what_is_rendered_of_a_shipped_file_is_a_config_that_serve_deploys(file, served, tmp_path):
    from ray.serve.schema import HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    from dlm_ray.config.server_file import load_server
    from dlm_ray.runtime.serve import deploy as runtime

    _, _, checkpoint = served
    server = load_server(str(file))
    own = ["models.0.checkpoint", "models.1.checkpoint"] if server.models else ["checkpoint"]
    server = load_server(str(file), [*(f"{key}={checkpoint}" for key in own), "http.api_keys_file=null"])
    plain = runtime.rendered(server)
    # Serve's schema says nothing of keys that it does not know.
    assert set(plain) <= set(ServeDeploySchema.model_fields) and set(plain["http_options"]) <= set(
        HTTPOptionsSchema.model_fields
    )
    assert all(set(one) <= set(ServeApplicationSchema.model_fields) for one in plain["applications"])
    config = ServeDeploySchema.model_validate(yaml.safe_load(yaml.safe_dump(plain)))
    [one] = config.applications
    assert config.http_options.host == server.http.host and Server.model_validate(one.args) == server
    module, _, name = one.import_path.partition(":")
    front = getattr(importlib.import_module(module), name)(one.args)._bound_deployment
    [engine] = [argument._bound_deployment for argument in front.init_args if hasattr(argument, "_bound_deployment")]
    scaling, asked = engine._deployment_config.autoscaling_config, server.replicas.autoscaling
    assert (scaling and scaling.max_replicas) == (asked and asked.max_replicas)
    assert engine.ray_actor_options["num_gpus"] == server.replicas.gpus


def test_what_contradicts_itself_or_is_not_there_is_refused_when_serve_builds_it(tmp_path):
    from dlm_ray.runtime.serve import deploy as runtime

    with pytest.raises(UserError, match="replicas.models=2, and there are 1 to hold"):
        runtime.application({"checkpoint": "x", "replicas": {"models": 2}})
    with pytest.raises(
        UserError, match=r"models.0.checkpoint=.*neither a checkpoint of ours .*nor a Hugging Face folder"
    ):
        runtime.application({"models": [{"checkpoint": str(tmp_path)}]})
