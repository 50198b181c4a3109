"""Many clients at once against `dlm-ray serve` on loopback: how long they waited, what was refused, and whether every request was answered once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

CLIENTS = 32
PROMPT_TOKENS, WRITTEN_TOKENS = (32, 96), (16, 48)
_MODEL = "load"
_ANSWER_SECONDS = 300.0


@dataclass(frozen=True)
class LoadRequest:
    """What a client asks for; no two requests begin alike."""

    prompt: list[int]
    """Ids, without the start token."""
    num_tokens: int
    """To write at most."""
    seed: int


def load_request(client: int, number: int, vocab_size: int) -> LoadRequest:
    """The request `number` of a client, the same in every run."""
    random = np.random.default_rng((client, number))
    prompt = random.integers(1, vocab_size, random.integers(*PROMPT_TOKENS)).tolist()
    return LoadRequest(prompt, int(random.integers(*WRITTEN_TOKENS)), client * 1_000_000 + number)


@dataclass
class _Seen:
    """What the clients saw."""

    num_sent: int = 0
    num_tokens: int = 0
    num_refused: int = 0
    latencies: list[float] = field(default_factory=list)
    """Seconds, of the requests that got a text."""
    ids: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Answers that belong to another request."""


def run(url: str, vocab_size: int, seconds: float) -> dict[str, Any]:
    """Clients that ask again as soon as they are answered, for so long and until the last answer.

    Returns:
        Counts of requests: lost ones were sent and never answered; doubled ones came twice, or the service counts more answers than the clients.
    """
    counted = _answered(url)
    seen, started = _Seen(), time.monotonic()
    asyncio.run(_ask(url, vocab_size, started + seconds, seen))
    elapsed = time.monotonic() - started
    counted = _answered(url) - counted
    cuts = statistics.quantiles(seen.latencies, n=20)
    return {
        "clients": CLIENTS,
        "seconds": round(elapsed, 1),
        "requests": seen.num_sent,
        "answered": len(seen.latencies),
        "refused_with_retry_after": seen.num_refused,
        "errors": seen.errors,
        "lost": seen.num_sent - len(seen.latencies) - seen.num_refused - len(seen.errors),
        "doubled": max(len(seen.ids) - len(set(seen.ids)), counted - len(seen.latencies)),
        "of_another_request": seen.wrong,
        "tokens_per_second": round(seen.num_tokens / elapsed, 2),
        "latency_seconds": {"p50": round(cuts[9], 2), "p95": round(cuts[18], 2)},
    }


async def _ask(url: str, vocab_size: int, until: float, seen: _Seen) -> None:
    async with httpx.AsyncClient(
        base_url=url, timeout=_ANSWER_SECONDS, limits=httpx.Limits(max_connections=CLIENTS)
    ) as http:

        async def client(name: int) -> None:
            number = 0
            while time.monotonic() < until:
                await _one(http, load_request(name, number, vocab_size), seen)
                number += 1

        await asyncio.gather(*(client(name) for name in range(CLIENTS)))


async def _one(http: httpx.AsyncClient, own: LoadRequest, seen: _Seen) -> None:
    """One request and its answer."""
    body = {"model": _MODEL, "prompt": own.prompt, "max_tokens": own.num_tokens, "seed": own.seed}
    started = time.monotonic()
    seen.num_sent += 1
    try:
        answer = await http.post("/v1/completions", json=body)
    except httpx.HTTPError:
        return  # lost
    if answer.status_code in (429, 503) and "retry-after" in answer.headers:
        seen.num_refused += 1
        await asyncio.sleep(float(answer.headers["retry-after"]))
        return
    if answer.status_code != 200:
        seen.errors.append(f"{answer.status_code} {answer.text[:200]}")
        return
    seen.latencies.append(time.monotonic() - started)
    said = answer.json()
    seen.ids.append(said["id"])
    seen.num_tokens += said["usage"]["completion_tokens"]
    if (said["dlm_ray"]["seed"], said["usage"]["prompt_tokens"]) != (own.seed, len(own.prompt)):
        seen.wrong.append(said["id"])


def _answered(url: str) -> int:
    """Texts that the service says it has written."""
    page = httpx.get(f"{url}/metrics").text
    found = re.search(r'^dlm_ray_http_requests_total\{path="/v1/completions",status="200"\} (\d+)', page, re.MULTILINE)
    return int(found[1]) if found else 0


@contextlib.contextmanager
def served(checkpoint: Path, slots: int, num_gpus: int) -> Iterator[str]:
    """The URL of one replica behind `dlm-ray serve`; Ray gives a replica as many threads as CPUs, here one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "dlm_ray",
        "serve",
        str(checkpoint),
        "--port",
        str(port),
        "--json",
        f"name={_MODEL}",
    ]
    command += [f"engine.slots={slots}", "replicas.cpus=1", f"replicas.gpus={num_gpus}"]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            assert process.stdout is not None, "its output is a pipe"
            line = process.stdout.readline()
            if not line:
                said.seek(0)
                raise RuntimeError(f"the service did not start: {said.read()[-2000:]}")
            yield json.loads(line)["url"]
        finally:
            process.terminate()
            process.wait(timeout=120)
