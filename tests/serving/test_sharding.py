"""A network on two processes: the texts of one, half the memory each, and an end for all when one is lost."""

import asyncio
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import service
import torch
from conftest import tiny_recipe
from test_engine import finish, job
from torch.distributed.tensor import DTensor

from dlm_ray.checkpoint.export import export
from dlm_ray.config.server import Engine as Settings
from dlm_ray.config.server import Server
from dlm_ray.serving import sharding
from dlm_ray.serving.engine import Engine
from dlm_ray.serving.host import Host
from dlm_ray.serving.loading import load, load_network
from dlm_ray.training import loop

SPAWN = multiprocessing.get_context("spawn")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(data_folder, tmp_path_factory):
    """Blocks, the whole canvas, and a Hugging Face folder whose head is not its embedding."""
    folder = service.train(data_folder, tmp_path_factory.mktemp("runs"), "block8", "whole")
    untied = {"objective__name": "autoregressive", "model__architecture__tie_embeddings": False}
    loop.fit(tiny_recipe(data_folder, "ar", training__steps=15, **untied), folder / "ar")
    export(str(folder / "ar"), str(folder / "exported"))
    return folder


def elsewhere(function, *arguments):
    """What the function gives in a process of its own: a process is in one group in its life."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(function, *arguments).result(timeout=240)


def follow(port, checkpoints):
    torch.set_num_threads(1)
    group = sharding.join(1, 2, port, CPU)
    for checkpoint in checkpoints:
        sharding.follow(group, load_network(checkpoint, mesh=group.mesh))


def start(*checkpoints):
    """(group, follower) of a leader and one follower, which follows in one network after the other."""
    store = sharding.meeting_place()
    follower = SPAWN.Process(target=follow, args=(store.port, checkpoints), daemon=True)
    follower.start()
    return sharding.join(0, 2, store, CPU), follower


def write(model, **settings):
    """Texts of more prompts than there are slots."""
    engine = Engine(model, Settings(slots=4, **settings))
    jobs = [job(model, ["the model", "a", ""][number % 3], 9 + 3 * number, seed=number) for number in range(6)]
    engine.submit(jobs)
    texts, _ = finish(engine)
    return [texts[one] for one in jobs]


def write_on_two(checkpoints):
    torch.set_num_threads(1)
    group, follower = start(*checkpoints)
    written = []
    for checkpoint in checkpoints:
        model = load(checkpoint, mesh=group.mesh)
        leader = sharding.Leader(group, model.denoiser)
        written.append((write(model), write(model, batch_invariant=True)))
        # Between calls nothing is gathered.
        parameters = list(model.denoiser.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        own, whole = (sum(tensor.nbytes for tensor in tensors) for tensors in ([one.to_local() for one in parameters], parameters))
        assert own / whole < 0.51
        leader.stop()
    follower.join(timeout=30)
    return written, follower.exitcode


def test_texts_are_those_of_one_process_with_half_the_parameters_each_and_a_stop_ends_the_followers(runs):
    checkpoints = [runs / name for name in ("block8", "whole", "exported")]
    written, exitcode = elsewhere(write_on_two, checkpoints)
    for checkpoint, (as_they_come, in_fixed_shapes) in zip(checkpoints, written, strict=True):
        model = load(checkpoint)
        assert as_they_come == write(model)
        assert in_fixed_shapes == write(model, batch_invariant=True)
    assert exitcode == 0


def lose_the_follower(checkpoint):
    """Seconds until a request is answered after the follower has died, the answers before and after, and what `check` says then."""
    torch.set_num_threads(1)
    group, follower = start(checkpoint)
    host = Host(Server(checkpoint=str(checkpoint)), group)

    async def ask():
        task = {
            "request_id": "r",
            "prompts": ["the model"],
            "messages": None,
            "suffix": None,
            "lengths": [12],
            "length_field": "max_tokens",
        }
        task |= {"n": 1, "seed": 1, "stops": [], "options": {}, "is_streamed": False, "is_shown": False, "timeout_seconds": None}
        return [event async for events in host.generate(task) for event in events]

    before = asyncio.run(ask())
    host.check()
    follower.kill()
    started = time.monotonic()
    after = asyncio.run(ask())
    seconds = time.monotonic() - started
    with pytest.raises(RuntimeError) as raised:
        host.check()
    host.close()
    return seconds, before[-1], after[-1], str(raised.value)


def test_a_follower_that_dies_fails_the_next_call_and_the_replica_says_so(runs):
    seconds, before, after, said = elsewhere(lose_the_follower, runs / "block8")
    assert before["finish_reason"] == "length" and after["error"][2] == "internal"
    assert seconds < 5 and "lost each other" in said


def lead_and_die(checkpoint, pid):
    group, follower = start(checkpoint)
    sharding.Leader(group, load_network(checkpoint, mesh=group.mesh))
    pid.send(follower.pid)
    os._exit(1)


def test_a_follower_ends_when_the_leader_dies(runs):
    receiving, sending = SPAWN.Pipe(duplex=False)
    leader = SPAWN.Process(target=lead_and_die, args=(runs / "block8", sending))
    leader.start()
    sending.close()
    follower = receiving.recv()
    leader.join()
    service.until(lambda: not os.path.exists(f"/proc/{follower}"), seconds=10)
