"""A network on two processes: the texts of one, half the memory each, and the end of both when one is lost."""

import asyncio
import contextlib
import os
import signal
import time

import pytest
import torch
from helpers.jobs import finish, job
from helpers.processes import PROCESSES
from torch.distributed.tensor import DTensor

from dlm_ray.config.server import EngineSettings as Settings
from dlm_ray.config.server import Server
from dlm_ray.generation.loading import load, load_network
from dlm_ray.serving import sharding
from dlm_ray.serving.engine import Engine
from dlm_ray.serving.worker import EngineWorker

pytestmark = pytest.mark.long

CPU = torch.device("cpu")


def follow(port, checkpoints):
    torch.set_num_threads(1)
    group = sharding.join(1, 2, port, CPU)
    for checkpoint in checkpoints:
        sharding.follow(group, load_network(checkpoint, mesh=group.mesh))


def lead(port, result, function, *arguments):
    torch.set_num_threads(1)
    result.send(function(sharding.join(0, 2, port, CPU), *arguments))


@contextlib.contextmanager
def two_processes(checkpoints, function, *arguments):
    """Yield (follower, leader, a connection to receive the result of `function(group, *arguments)` on the leader).

    The follower serves one checkpoint after the other. A process can join only one group.
    """
    store = sharding.create_store()
    receiving, sending = PROCESSES.Pipe(duplex=False)
    follower = PROCESSES.Process(target=follow, args=(store.port, checkpoints))
    leader = PROCESSES.Process(target=lead, args=(store.port, sending, function, *arguments))
    for process in (follower, leader):
        process.start()
    sending.close()
    try:
        yield follower, leader, receiving
    finally:
        for process in (follower, leader):
            process.kill()
            process.join()


def write(model, **settings):
    """Return the texts of more prompts than there are slots."""
    engine = Engine(model, Settings(slots=2, **settings))
    jobs = [job(model, ["the model", "a", ""][number], 7 + 2 * number, seed=number) for number in range(3)]
    engine.submit(jobs)
    texts, _ = finish(engine)
    return [texts[item] for item in jobs]


def write_on_two(group, checkpoints):
    written = []
    for checkpoint in checkpoints:
        model = load(checkpoint, mesh=group.mesh)
        leader = model.denoiser = sharding.LeaderDenoiser(group, model.denoiser)
        written.append(write(model, batch_invariant=checkpoint.name == "block8"))
        # Between calls the parameters stay sharded.
        parameters = list(model.denoiser.parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        local, whole = (
            sum(tensor.nbytes for tensor in tensors)
            for tensors in ([parameter.to_local() for parameter in parameters], parameters)
        )
        assert local / whole < 0.51
        leader.stop()
    return written


def test_two_processes_write_the_texts_of_one_with_half_the_parameters_each_and_stop_together(runs):
    checkpoints = [runs / name for name in ("block8", "whole", "exported")]
    with two_processes(checkpoints, write_on_two, checkpoints) as (follower, _, result):
        written = result.recv()
        follower.join(timeout=30)
        assert follower.exitcode == 0
    assert written == [
        write(load(checkpoint), batch_invariant=checkpoint.name == "block8") for checkpoint in checkpoints
    ]


def lose_the_follower(group, checkpoint, pid):
    """Kill the follower.

    Return the seconds to the next answer, the answers before and after, and the error of `check`.
    """
    worker = EngineWorker(Server(checkpoint=str(checkpoint)), group)

    async def events():
        task = {
            "request_id": "r",
            "prompts": ["the model"],
            "messages": None,
            "suffix": None,
            "lengths": [12],
            "length_field": "max_tokens",
        }
        task |= {
            "n": 1,
            "seed": 1,
            "stops": [],
            "options": {},
            "is_streamed": False,
            "stream_canvas": False,
            "timeout_seconds": None,
        }
        return [event async for batch in worker.generate(task) for event in batch]

    before = asyncio.run(events())
    worker.check()
    os.kill(pid.recv(), signal.SIGKILL)
    started = time.monotonic()
    after = asyncio.run(events())
    seconds = time.monotonic() - started
    with pytest.raises(RuntimeError) as raised:
        worker.check()
    worker.close()
    return seconds, before[-1], after[-1], str(raised.value)


def test_the_next_call_and_the_health_check_fail_after_a_follower_dies(runs):
    pid, sending = PROCESSES.Pipe(duplex=False)
    with two_processes([runs / "block8"], lose_the_follower, runs / "block8", pid) as (follower, _, result):
        sending.send(follower.pid)
        seconds, before, after, message = result.recv()
    assert before["finish_reason"] == "length" and after["error"][2] == "replica_lost"
    assert seconds < 5 and "lost each other" in message


def die(group, checkpoint):
    sharding.LeaderDenoiser(group, load_network(checkpoint, mesh=group.mesh))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_follower_ends_when_the_leader_dies(runs):
    with two_processes([runs / "block8"], die, runs / "block8") as (follower, leader, _):
        leader.join(timeout=60)
        follower.join(timeout=10)
        assert (leader.exitcode, follower.exitcode) == (-signal.SIGKILL, 1)
