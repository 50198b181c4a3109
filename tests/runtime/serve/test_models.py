"""Several models in one replica, in this process.

Who is loaded when, what becomes of texts that are under way, and what cannot be loaded.
"""

import asyncio
import gc
import shutil
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import service

from dlm_ray.config.errors import UserError
from dlm_ray.config.server import Server
from dlm_ray.generation.loading import load
from dlm_ray.serving.http.app import build
from dlm_ray.serving.model_pool import ModelPool
from dlm_ray.serving.pinning import pinned


@pytest.fixture
def residents(runs, monkeypatch):
    """(application, residents) of models of these names, with Serve's own cache."""
    from ray import serve
    from ray.serve import multiplex

    # The cache tells Serve's controller what it holds; here is none.
    monkeypatch.setattr(
        multiplex, "_get_internal_replica_context", lambda: SimpleNamespace(app_name="", deployment="", replica_id="")
    )
    monkeypatch.setattr(multiplex._ModelMultiplexWrapper, "_push_model_ids_info", lambda self: None)

    def made(*names, **parts):
        models = [{"checkpoint": str(name if isinstance(name, Path) else runs / name)} for name in names]
        server = pinned(Server(models=models, limits={"output_tokens": 5000}, **parts))
        own = ModelPool(server, serve.multiplexed(max_num_models_per_replica=server.models_at_once))
        return build(server, own, [], 100), own

    return made


class Held:
    """An engine that makes one call for its requests and then no other until it is released."""

    def __init__(self, engine):
        self._has_started, self._may_go_on = threading.Event(), threading.Event()
        tick = engine.tick

        def held(*arguments):
            if engine.num_active:
                self._has_started.set()
                self._may_go_on.wait(60)
            return tick(*arguments)

        engine.tick = held

    async def started(self):
        """Wait until the engine has a request in a slot."""
        assert await asyncio.to_thread(self._has_started.wait, 60)

    def release(self):
        """Let the engine go on."""
        self._may_go_on.set()


def body(model, **asked):
    return {"model": model, "prompt": "the model", "max_tokens": 20, "seed": 1, **asked}


def engines():
    return sum(thread.name == "engine" for thread in threading.enumerate())


def test_requests_choose_among_models_and_the_list_says_what_each_can(residents, runs):
    app, own = residents("block8", "ar", "whole")

    async def run():
        await own.load()
        async with service.client(app) as http:
            cards = (await http.get("/v1/models")).json()["data"]
            asked = [http.post("/v1/completions", json=body(name)) for name in ("ar", "block8", "whole")]
            texts = [answer.json()["choices"][0]["text"] for answer in await asyncio.gather(*asked)]
            scored = (await http.post("/v1/score", json={"model": "ar", "text": "the model"})).json()
            one = (await http.get("/v1/models/ar")).json()
            unknown = [await http.get("/v1/models/other"), await http.post("/v1/completions", json=body("other"))]
        return cards, texts, scored, one, unknown

    cards, texts, scored, one, unknown = asyncio.run(run())
    assert [(card["id"], card["kind"], card["capabilities"]["infill"]) for card in cards] == [
        ("block8", "block", False),
        ("ar", "autoregressive", False),
        ("whole", "whole", True),
    ]
    assert cards[1] == one and one["checkpoint"] == {"name": "ar/step_00000015", "weights": "ema"}
    for name, text in zip(("ar", "block8", "whole"), texts, strict=True):
        assert load(runs / name).sample("the model", length_tokens=20, seed=1) == [text]
    assert scored["model"] == "ar" and not scored["is_bound"]
    for answer in unknown:
        assert answer.status_code == 404 and "'block8', 'ar', 'whole'" in answer.json()["error"]["message"]


def test_while_a_service_changes_its_replicas_say_which_models_there_are(residents):
    _, own = residents("block8", "ar")
    app = build(Server(checkpoint="runs/new"), own, [], 100)  # an ingress of the new file over a replica of the old one

    async def run():
        await own.load()
        async with service.client(app) as http:
            return [await http.post("/v1/completions", json=body(name)) for name in ("ar", "new", "other")]

    old, new, other = asyncio.run(run())
    assert old.status_code == 200
    for answer in (new, other):
        assert answer.status_code == 404 and "'block8', 'ar'" in answer.json()["error"]["message"]


def test_a_model_makes_room_after_its_texts_have_ended_and_its_memory_is_free(residents, runs):
    app, own = residents("block8", "ar", replicas={"models": 1})

    async def run():
        before = engines()
        await own.load()
        assert engines() == before + 1
        weights = weakref.ref(next(own._workers["block8"].model.denoiser.parameters()))
        async with service.client(app) as http:
            held = Held(own._workers["block8"].engine)
            long = asyncio.ensure_future(
                http.post("/v1/completions", json=body("block8", max_tokens=100, temperature=0))
            )
            await held.started()
            waiting = asyncio.ensure_future(http.post("/v1/completions", json=body("ar")))
            held.release()
            other = await waiting
            assert long.done(), "the text that was under way came first"
            assert (await long).json()["usage"]["completion_tokens"] == 100
            assert engines() == before + 1
            gc.collect()
            assert weights() is None
            mixed = await asyncio.gather(
                *(http.post("/v1/completions", json=body(name)) for name in ["block8", "ar"] * 3)
            )
            return other, [answer.json()["choices"][0]["text"] for answer in mixed]

    other, mixed = asyncio.run(run())
    [by_block], [by_ar] = (load(runs / name).sample("the model", length_tokens=20, seed=1) for name in ("block8", "ar"))
    assert other.json()["choices"][0]["text"] == by_ar and mixed == [by_block, by_ar] * 3


def test_who_waits_for_room_has_a_deadline_and_what_has_gone_is_said(residents, runs, tmp_path):
    shutil.copytree(runs / "ar", tmp_path / "passing")
    app, own = residents("block8", tmp_path / "passing", replicas={"models": 1})

    async def run():
        await own.load()
        held = Held(own._workers["block8"].engine)
        shutil.rmtree(tmp_path / "passing")
        async with service.client(app) as http:
            long = asyncio.ensure_future(
                http.post("/v1/completions", json=body("block8", max_tokens=40, temperature=0))
            )
            await held.started()
            late = await http.post("/v1/completions", json=body("passing", timeout_seconds=0.2))
            assert not long.done()
            held.release()
            gone = await http.post("/v1/completions", json=body("passing"))
            return (await long).status_code, late, gone, await http.post("/v1/completions", json=body("block8"))

    long, late, gone, after = asyncio.run(run())
    assert long == after.status_code == 200
    assert late.status_code == 408 and "within 0.2 seconds" in late.json()["error"]["message"]
    assert (
        gone.status_code == 503
        and gone.json()["error"]["code"] == "model_unavailable"
        and "retry-after" in gone.headers
    )


def test_a_dead_engine_is_reported_and_one_that_made_room_is_not(residents):
    _, own = residents("block8", "ar", replicas={"models": 1})

    async def run():
        await own.load()
        own.check()
        await own.score("ar", "the model", 1, 0)
        own.check()
        host = own._workers["ar"]
        host._do(sys.exit)  # nothing catches it, as a thread that dies of a mistake of ours
        host._thread.join()

    asyncio.run(run())
    with pytest.raises(RuntimeError, match="thread has ended"):
        own.check()


def test_checkpoints_are_held_to_the_step_that_is_the_last_when_the_service_starts(runs, monkeypatch):
    step = runs / "block8" / "step_00000015"
    monkeypatch.chdir((runs / "ar").parent)
    one = pinned(Server(checkpoint="block8", weights="raw"))
    assert one.checkpoint == str(step) and one.model_name == "block8" and one.weights == "raw"
    several = pinned(Server(models=[{"checkpoint": "block8", "name": "blocks"}, {"checkpoint": "ar"}]))
    assert several.model_names == ["blocks", "ar"] and several.models[1].weights == "ema"
    assert pinned(several) == several and pinned(one) == one
    with pytest.raises(UserError) as raised:
        pinned(Server(models=[{"checkpoint": "block8"}, {"checkpoint": str(runs.folder)}, {"checkpoint": "../none"}]))
    assert f"models.1.checkpoint={runs.folder}: " in str(raised.value) and "models.2.checkpoint=../none: " in str(
        raised.value
    )
    assert "models.0" not in str(raised.value)
