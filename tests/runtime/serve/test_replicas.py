"""Replicas that come and go while requests run.

A dead engine, another checkpoint, a kill, load, and the end of the service.
"""

import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
from helpers.deployment import engines
from helpers.processes import until

from dlm_ray.config.errors import UserError

pytestmark = pytest.mark.ray


PROMPTS = ("a", "the", "row", "the model")  # at temperature 0 their texts have no end
TWO = {"cpus": 0.2, "drain_seconds": 30, "count": 2}


@contextmanager
def asked_all_the_time(url, model="tiny"):
    """A list of (when it was asked, text), to which six clients add without an end, half of them streaming.

    Whatever fails is raised at the end.
    """
    done, answers = threading.Event(), []
    own = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    asked = {"model": model, "prompt": "the model", "seed": 7}  # fixed shapes: the text says which weights wrote it

    def ask(number):
        while not done.is_set():
            began = time.monotonic()
            if number % 2:
                chunks = list(own.completions.create(**asked, max_tokens=200, stream=True))
                assert chunks[-1].choices[0].finish_reason
                answers.append((began, "".join(chunk.choices[0].text for chunk in chunks)))
            else:
                answers.append((began, own.completions.create(**asked, max_tokens=200).choices[0].text))

    with ThreadPoolExecutor(6) as clients:
        asking = [clients.submit(ask, number) for number in range(6)]
        try:
            yield answers
        finally:
            done.set()
    for one in asking:
        one.result()


def test_a_replica_whose_engine_has_died_is_replaced(deployment):
    import ray

    url = deployment.use()
    [name] = engines()

    def die(actor):
        residents = actor._replica_impl._user_callable_wrapper.user_callable._pool
        residents._workers["tiny"]._do(sys.exit)

    ray.get(ray.get_actor(name, namespace="serve").__ray_call__.remote(die))
    until(lambda: name not in engines(), 60)
    own = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    assert own.completions.create(model="tiny", prompt="the model", max_tokens=9).choices[0].finish_reason


def test_another_checkpoint_takes_over_under_load_with_one_replica_and_no_request_fails(deployment):
    url = deployment.use()
    [before] = httpx.get(f"{url}/v1/models").json()["data"]
    with asked_all_the_time(url) as answers:
        until(lambda: len(answers) > 6)
        own = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        long = own.completions.create(model="tiny", prompt="the model", temperature=0, max_tokens=1000, stream=True)
        next(long)
        deployment.use(checkpoint=str(deployment.runs / "longer"))
        finished = time.monotonic()
        until(lambda: sum(asked > finished for asked, _ in answers) > 6)
        ends = [chunk.choices[0].finish_reason for chunk in long if chunk.choices[0].finish_reason]
    [after] = httpx.get(f"{url}/v1/models").json()["data"]
    assert (before["checkpoint"]["name"], after["checkpoint"]["name"]) == (
        "block8/step_00000015",
        "longer/step_00000060",
    )
    old, new = answers[0][1], answers[-1][1]
    assert {text for _, text in answers} == {old, new} and old != new
    assert {text for asked, text in answers if asked > finished} == {new}
    assert ends == ["length"]  # the stream that was under way was not cut


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_loaded_leaves_the_old_one_serving(deployment):
    from dlm_ray.runtime.serve import deploy as runtime

    url, settings, runs = deployment.use(), deployment.settings, deployment.runs
    [before] = httpx.get(f"{url}/v1/models").json()["data"]
    for parts, message in (
        ({"checkpoint": str(runs / "none")}, "checkpoint=.*none"),
        ({"http": {"port": 1}}, "an address cannot be changed"),
        ({"replicas": {"cpus": 64}}, "the resources that the running service leaves free"),
    ):
        with pytest.raises(UserError, match=message):
            runtime.replace(settings(**parts))
    with asked_all_the_time(url) as answers:
        with pytest.raises(UserError, match="the old service continues unchanged: the service did not start"):
            runtime.replace(settings(checkpoint=str(runs / "damaged")))
        until(lambda: len(answers) > 12)
    assert len({text for _, text in answers}) == 1
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["checkpoint"] == before["checkpoint"]


@pytest.mark.slow
def test_load_adds_a_second_replica_and_idleness_removes_it(deployment):
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_requests": 3,
        "upscale_delay_seconds": 1,
        "downscale_delay_seconds": 2,
    }
    url = deployment.use(engine={"slots": 2}, replicas={"cpus": 0.2, "autoscaling": scaling})
    assert len(engines()) == 1
    with asked_all_the_time(url) as answers:
        until(lambda: len(engines()) == 2, 90)
        until(lambda: len(answers) > 12, 60)
    until(lambda: len(engines()) == 1, 90)
    assert httpx.get(f"{url}/readyz").status_code == 200


def test_a_replica_killed_under_load_costs_no_whole_answer_and_ends_streams_with_an_error(deployment):
    import ray

    url = deployment.use(replicas=TWO)
    replicas = [ray.get_actor(name, namespace="serve") for name in engines()]
    assert len(replicas) == 2
    stop_asking = threading.Event()
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    texts = [[] for _ in range(4)]

    def whole(number):
        while not stop_asking.is_set():
            request = {"model": "tiny", "prompt": "the model", "max_tokens": 24, "seed": number}
            texts[number].append(client.completions.create(**request).choices[0].text)

    def streamed(prompt):
        try:
            request = {"model": "tiny", "prompt": prompt, "max_tokens": 100_000, "temperature": 0}
            with client.completions.create(**request, stream=True, timeout=60) as events:
                for _ in events:
                    if stop_asking.is_set():
                        return "stopped"
        except openai.APIError as error:
            return error.body["code"]
        return "finished"

    def load_and_pid(actor):
        pool = actor._replica_impl._user_callable_wrapper.user_callable._pool
        return pool._workers["tiny"].engine.num_active, os.getpid()

    def busiest():
        return max(ray.get([replica.__ray_call__.remote(load_and_pid) for replica in replicas]))

    with ThreadPoolExecutor(8) as clients:
        streams = [clients.submit(streamed, prompt) for prompt in PROMPTS]
        until(lambda: busiest()[0] > 0)  # only streams run: one of them is on the replica that is killed
        _, victim = busiest()
        asking = [clients.submit(whole, number) for number in range(len(texts))]
        until(lambda: min(map(len, texts)) >= 1, 60)
        os.kill(victim, signal.SIGKILL)
        answered = max(map(len, texts))
        until(lambda: min(map(len, texts)) > answered + 1, 60)
        stop_asking.set()
        for one in asking:
            one.result()  # none failed
        ends = [one.result() for one in streams]
    assert [len(set(same_seed)) for same_seed in texts] == [1] * len(texts), "each was the same text, before and after"
    assert "replica_lost" in ends and set(ends) <= {"replica_lost", "stopped"}


def test_stopping_the_service_finishes_accepted_requests(deployment):
    url = deployment.use(replicas=TWO)

    def num_texts():
        return int(re.search(r"texts_under_way (\d+)", httpx.get(f"{url}/metrics").text)[1])

    until(lambda: num_texts() == 0)
    with ThreadPoolExecutor(1) as clients:
        body = {"model": "tiny", "prompt": "the model", "max_tokens": 400, "temperature": 0}
        answer = clients.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
        until(lambda: num_texts() == 1 or answer.done())
        assert not answer.done(), answer.result().text
        deployment.stop()
        assert answer.result().status_code == 200
        assert answer.result().json()["usage"]["completion_tokens"] == 400
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")
