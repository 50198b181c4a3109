"""Processes that start in milliseconds, ports for servers, and waiting for a condition.

A fork server imports torch and the training loop once; every process of a test is a fork of it.
"""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from pathlib import Path

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "dlm_ray.training.loop",
        "dlm_ray.serving.worker",
        "transformers.models.llama.modeling_llama",
        "torch.distributed.fsdp",
        "helpers.victim",
        "pytest",
    ]
)


def run_ranks(function, num_ranks, *arguments, timeout=120):
    """Run `function(rank, *arguments)` in one process a rank, with the environment of torchrun.

    Return the exit codes.
    """
    port = free_port()
    ranks = [
        PROCESSES.Process(target=_run_rank, args=(function, rank, num_ranks, port, arguments))
        for rank in range(num_ranks)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    alive = [process for process in ranks if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, f"{len(alive)} of {num_ranks} processes ran for more than {timeout} s"
    return [process.exitcode for process in ranks]


def _run_rank(function, rank, num_ranks, port, arguments):
    """Call the function, and leave without the interpreter's end, in which torch's own threads may abort on a busy
    machine.
    """
    import torch

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    code = 1
    try:
        code = function(rank, *arguments) or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class ForkedModule:
    """`python -m module arguments` as a fork of the server: a process of its own, with its signals and its exit code.

    `stdout` and `stderr` are files in `folder`.
    """

    def __init__(self, folder, module, *arguments):
        self._streams = [Path(folder, f"{module}.{name}") for name in ("stdout", "stderr")]
        command = [module, *map(str, arguments)]
        self._process = PROCESSES.Process(target=_run_module, args=(command, [str(path) for path in self._streams]))
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        """Return the exit code, or None while the process runs."""
        return self._process.exitcode

    def send_signal(self, number):
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def wait(self, timeout=100):
        """Wait for the end; return the exit code, the text on stdout and the text on stderr."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        stdout, stderr = (path.read_text() for path in self._streams)
        assert self._process.exitcode != -9, f"the process did not end within {timeout} s: {stderr}"
        return self._process.exitcode, stdout, stderr


def _run_module(command, streams):
    import runpy

    for descriptor, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def free_port():
    """Return a TCP port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def until(condition, seconds=30.0, process=None):
    """Wait until `condition()` holds; return the seconds it took. Fail after `seconds` or when `process` ends first."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"the condition did not hold within {seconds} s"
        assert process is None or process.poll() is None, f"the process ended first, with exit code {process.poll()}"
        time.sleep(0.01)
    return time.monotonic() - started
