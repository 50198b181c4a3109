"""A service that changes while it is asked: another checkpoint, one that cannot be loaded, more replicas and fewer, an engine that dies."""

import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import openai
import pytest
from helpers import service
from helpers.processes import free_port, until
from helpers.recipes import tiny_recipe

from dlm_ray.config.errors import UserError
from dlm_ray.config.server import Server
from dlm_ray.training import loop

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def runs(data_folder, tmp_path_factory):
    folder = service.train(data_folder, tmp_path_factory.mktemp("served"), "block8", "ar")
    blocks = {
        "objective__name": "block",
        "objective__block_tokens": 8,
        "objective__shift": False,
        "training__steps": 60,
    }
    loop.fit(tiny_recipe(data_folder, "longer", **blocks), folder / "longer")
    shutil.copytree(folder / "longer", folder / "damaged")
    for file in (folder / "damaged").rglob("step_*/*/d/*"):
        file.write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def served(ray_session, runs):
    """(url, settings) of one replica of one model; `settings(**parts)` are the same with other parts."""
    from ray.serve.exceptions import RayServeException

    from dlm_ray.runtime.serve import deploy as runtime

    port = free_port()

    def settings(**parts):
        own = {
            "checkpoint": str(runs / "block8"),
            "name": "tiny",
            "engine": {"slots": 32, "batch_invariant": True, "deadline_seconds": 60},
            "limits": {"output_tokens": 200_000},
            "http": {"port": port},
            "replicas": {"cpus": 0.2},
        }
        return Server.model_validate({**own, **parts})

    yield runtime.start(settings()), settings
    with suppress(RayServeException):
        runtime.stop()


@contextmanager
def asked_all_the_time(url, model="tiny"):
    """A list of (when it was asked, text), to which six clients add without an end, half of them streaming; whatever fails is raised at the end."""
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


def engines():
    from ray.util import list_named_actors

    return {actor["name"] for actor in list_named_actors(all_namespaces=True) if "#engine#" in actor["name"]}


def test_another_checkpoint_takes_over_under_load_with_one_replica_and_no_request_fails(served, runs):
    from dlm_ray.runtime.serve import deploy as runtime

    url, settings = served
    [before] = httpx.get(f"{url}/v1/models").json()["data"]
    with asked_all_the_time(url) as answers:
        until(lambda: len(answers) > 6)
        own = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        long = own.completions.create(model="tiny", prompt="the model", temperature=0, max_tokens=1000, stream=True)
        next(long)
        assert runtime.replace(settings(checkpoint=str(runs / "longer"))) == url
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
def test_a_checkpoint_that_cannot_be_loaded_leaves_the_old_one_serving(served, runs):
    from dlm_ray.runtime.serve import deploy as runtime

    url, settings = served
    [before] = httpx.get(f"{url}/v1/models").json()["data"]
    for parts, message in (
        ({"checkpoint": str(runs / "none")}, "checkpoint=.*none"),
        ({"http": {"port": 1}}, "an address cannot be changed"),
        ({"replicas": {"cpus": 64}}, "what is free beside the service that runs"),
    ):
        with pytest.raises(UserError, match=message):
            runtime.replace(settings(**parts))
    with asked_all_the_time(url) as answers:
        with pytest.raises(UserError, match="the old service goes on as it was: the service did not come up"):
            runtime.replace(settings(checkpoint=str(runs / "damaged")))
        until(lambda: len(answers) > 12)
    assert len({text for _, text in answers}) == 1
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["checkpoint"] == before["checkpoint"]


def test_load_brings_a_second_replica_and_idleness_takes_it_away(served, runs):
    from dlm_ray.runtime.serve import deploy as runtime

    url, settings = served
    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_requests": 3,
        "upscale_delay_seconds": 1,
        "downscale_delay_seconds": 2,
    }
    runtime.replace(settings(engine={"slots": 2}, replicas={"cpus": 0.2, "autoscaling": scaling}))
    assert len(engines()) == 1
    with asked_all_the_time(url) as answers:
        until(lambda: len(engines()) == 2, 90)
        until(lambda: len(answers) > 12, 60)
    until(lambda: len(engines()) == 1, 90)
    assert httpx.get(f"{url}/readyz").status_code == 200


def test_a_replica_whose_engine_has_died_is_replaced(served):
    import ray

    from dlm_ray.runtime.serve import deploy as runtime

    url, settings = served
    models = [{"checkpoint": settings().checkpoint, "name": name} for name in ("tiny", "small")]
    runtime.replace(settings(checkpoint=None, name=None, models=models))
    [name] = engines()

    def die(actor):
        residents = actor._replica_impl._user_callable_wrapper.user_callable._residents
        residents._hosts["small"]._do(sys.exit)

    ray.get(ray.get_actor(name, namespace="serve").__ray_call__.remote(die))
    until(lambda: name not in engines(), 60)
    own = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    for model in ("tiny", "small"):
        assert own.completions.create(model=model, prompt="the model", max_tokens=9).choices[0].finish_reason
