"""A load test of `dlm-ray serve` on loopback: throughput, latency, refusals, and lost or doubled answers."""

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

import httpx
import numpy as np

from dlm_ray.config.manifest_fields import JsonObject

NUM_CLIENTS = 32
PROMPT_TOKENS, GENERATED_TOKENS = (32, 96), (16, 48)
"""Ranges [low, high) of the tokens per request."""
_MODEL = "load"
_TIMEOUT_SECONDS = 300.0


@dataclass(frozen=True)
class LoadRequest:
    """A client's request; all prompts differ from their first tokens on."""

    prompt: list[int]
    """Token ids without the start token."""
    num_tokens: int
    """The most tokens to generate."""
    seed: int


def load_request(client: int, number: int, vocab_size: int) -> LoadRequest:
    """Return request `number` of a client; it is the same in every run."""
    random = np.random.default_rng((client, number))
    prompt = random.integers(1, vocab_size, random.integers(*PROMPT_TOKENS)).tolist()
    return LoadRequest(prompt, int(random.integers(*GENERATED_TOKENS)), client * 1_000_000 + number)


@dataclass
class _ClientLog:
    """What the clients sent and received."""

    num_sent: int = 0
    num_tokens: int = 0
    num_refused: int = 0
    latencies: list[float] = field(default_factory=list)
    """Seconds from request to answer, of the requests that got a text."""
    ids: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    """Ids of answers that belong to another request."""


def run(url: str, vocab_size: int, seconds: float) -> JsonObject:
    """Run clients that send their next request on every answer, for `seconds` and until the last answer.

    Returns:
        Rates, latencies, and counts of requests. `lost` requests were sent and never answered. `doubled` counts
        answers that came twice, or that only the service counted.
    """
    answered_before = _answered_requests(url)
    log, started = _ClientLog(), time.monotonic()
    asyncio.run(_run_clients(url, vocab_size, started + seconds, log))
    elapsed = time.monotonic() - started
    answered = _answered_requests(url) - answered_before
    quantiles = statistics.quantiles(log.latencies, n=20)
    return {
        "clients": NUM_CLIENTS,
        "seconds": round(elapsed, 1),
        "requests": log.num_sent,
        "answered": len(log.latencies),
        "refused_with_retry_after": log.num_refused,
        "errors": log.errors,
        "lost": log.num_sent - len(log.latencies) - log.num_refused - len(log.errors),
        "doubled": max(len(log.ids) - len(set(log.ids)), answered - len(log.latencies)),
        "of_another_request": log.mismatched,
        "tokens_per_second": round(log.num_tokens / elapsed, 2),
        "latency_seconds": {"p50": round(quantiles[9], 2), "p95": round(quantiles[18], 2)},
    }


async def _run_clients(url: str, vocab_size: int, until: float, log: _ClientLog) -> None:
    """Run all clients until the time `until` of the monotonic clock."""
    limits = httpx.Limits(max_connections=NUM_CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_SECONDS, limits=limits) as http:

        async def run_client(client: int) -> None:
            number = 0
            while time.monotonic() < until:
                await _send(http, load_request(client, number, vocab_size), log)
                number += 1

        await asyncio.gather(*(run_client(client) for client in range(NUM_CLIENTS)))


async def _send(http: httpx.AsyncClient, request: LoadRequest, log: _ClientLog) -> None:
    """Send one request, wait for its answer, and log the outcome."""
    body = {"model": _MODEL, "prompt": request.prompt, "max_tokens": request.num_tokens, "seed": request.seed}
    started = time.monotonic()
    log.num_sent += 1
    try:
        response = await http.post("/v1/completions", json=body)
    except httpx.HTTPError:
        return  # the request counts as lost
    if response.status_code in (429, 503) and "retry-after" in response.headers:
        log.num_refused += 1
        await asyncio.sleep(float(response.headers["retry-after"]))
        return
    if response.status_code != 200:
        log.errors.append(f"{response.status_code} {response.text[:200]}")
        return
    log.latencies.append(time.monotonic() - started)
    answer = response.json()
    log.ids.append(answer["id"])
    log.num_tokens += answer["usage"]["completion_tokens"]
    if (answer["dlm_ray"]["seed"], answer["usage"]["prompt_tokens"]) != (request.seed, len(request.prompt)):
        log.mismatched.append(answer["id"])


def _answered_requests(url: str) -> int:
    """Return the number of requests that the service has answered, by its own metrics."""
    page = httpx.get(f"{url}/metrics").text
    pattern = r'^dlm_ray_http_requests_total\{path="/v1/completions",status="200"\} (\d+)'
    match = re.search(pattern, page, re.MULTILINE)
    return int(match[1]) if match else 0


@contextlib.contextmanager
def served(checkpoint: Path, slots: int, num_gpus: int) -> Iterator[str]:
    """Serve a checkpoint with one replica of one CPU, and yield its URL.

    Ray gives a replica as many threads as CPUs, here one.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dlm_ray", "serve", str(checkpoint), "--port", str(port), "--json"]
    command += [f"name={_MODEL}", f"engine.slots={slots}", "replicas.cpus=1", f"replicas.gpus={num_gpus}"]
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        try:
            assert process.stdout is not None, "stdout is a pipe"
            line = process.stdout.readline()
            if not line:
                stderr.seek(0)
                raise RuntimeError(f"the service did not start: {stderr.read()[-2000:]}")
            yield json.loads(line)["url"]
        finally:
            process.terminate()
            process.wait(timeout=120)
