"""Commands as a user types them, ports for servers, and waiting for a condition."""

import os
import socket
import subprocess
import sys
import time


def python_module(module, *arguments, timeout=120, **environment):
    """Run `python -m module` in a process of its own; return the finished process."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )


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
