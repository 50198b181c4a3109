"""What serving costs: the engine's gain over one slot beside that of bare forwards, and many clients over HTTP beside the engine called directly.

`python -m dlm_ray.evaluation.speed_serving --out FILE` on loopback; the network has random weights (how many tokens a call accepts is not measured:
one a call), so nothing is said of text. Every ratio is of one run on one machine; the HTTP service is the application on a port of this process's child,
without Ray, or, with --url, one that is there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from dlm_ray.evaluation.speed_sampling import BLOCK_TOKENS, _call, _filled, timed

from dlm_ray.config.server import Engine as EngineSettings
from dlm_ray.serving.engine import Engine
from dlm_ray.serving.jobs import Job
from dlm_ray.serving.loading import load
from dlm_ray.serving.options import choose
from dlm_ray.serving.text_model import TextModel

SLOTS, PROMPT_TOKENS, WRITTEN_TOKENS = 32, 64, 64


def _job(model: TextModel, number: int) -> Job:
    chosen = choose({"rule": "first_hitting"}, model.sampled_as(), WRITTEN_TOKENS)
    return Job(f"bench-{number}", [model.tokenizer_identity.start_id] + [5] * (PROMPT_TOKENS - 1), WRITTEN_TOKENS, chosen, seed=number)


@torch.no_grad()
def gain(model: TextModel, repetitions: int) -> dict[str, Any]:
    """Tokens a second with 32 slots over one slot, beside bare calls of batch 32 over batch 1 on the same blocks, in turn."""
    ours: dict[int, list[float]] = {1: [], SLOTS: []}
    bare: dict[int, list[float]] = {1: [], SLOTS: []}
    caches = {batch: _filled(model.denoiser, batch, PROMPT_TOKENS + WRITTEN_TOKENS // 2) for batch in bare}
    for number in range(repetitions + 1):
        for slots in ours:
            engine = Engine(model, EngineSettings(slots=slots))
            engine.submit([_job(model, one) for one in range(slots)])
            elapsed = timed(lambda own=engine: _finish(own), model.device)
            calls = timed(
                lambda batch=slots: [_call(model.denoiser, caches[batch], batch, BLOCK_TOKENS, 1) for _ in range(8)], model.device
            )
            if number:  # the first pays for warming up
                ours[slots].append(slots * WRITTEN_TOKENS / elapsed)
                bare[slots].append(slots * 8 / calls)
    engine_gain, bare_gain = (statistics.median(own[SLOTS]) / statistics.median(own[1]) for own in (ours, bare))
    return {
        "engine_tokens_per_second": {str(slots): round(statistics.median(own), 1) for slots, own in ours.items()},
        "bare_rows_per_second": {str(batch): round(statistics.median(own), 1) for batch, own in bare.items()},
        "engine_gain": round(engine_gain, 3),
        "bare_gain": round(bare_gain, 3),
        "share_of_the_gain": round(engine_gain / bare_gain, 3),
    }


def _finish(engine: Engine) -> None:
    while engine.num_active or engine.waiting:
        engine.tick()


def direct(model: TextModel, seconds: float) -> float:
    """Tokens a second of the engine called directly, with a new text for each that is finished."""
    engine = Engine(model, EngineSettings(slots=SLOTS))
    engine.submit([_job(model, number) for number in range(SLOTS)])
    written, started, number = 0, time.perf_counter(), SLOTS
    while time.perf_counter() - started < seconds:
        for update in engine.tick():
            if update.finish_reason is not None:
                written += update.num_tokens
                engine.submit([_job(model, number)])
                number += 1
    return written / (time.perf_counter() - started)


async def load_test(url: str, model: str, clients: int, seconds: float) -> dict[str, Any]:
    """Clients that ask again as soon as they are answered: latencies, tokens a second, what was refused, what was lost or came twice."""
    until, latencies, tokens, refused, errors, ids = time.monotonic() + seconds, [], 0, 0, [], []  # type: ignore[var-annotated]

    async def client(number: int) -> None:
        nonlocal tokens, refused
        async with httpx.AsyncClient(timeout=seconds + 120) as http:
            asked = 0
            while time.monotonic() < until:
                body = {"model": model, "prompt": [5] * (PROMPT_TOKENS - 1), "max_tokens": WRITTEN_TOKENS, "rule": "first_hitting"}
                started = time.perf_counter()
                try:
                    answer = await http.post(f"{url}/v1/completions", json={**body, "seed": number * 1_000_000 + asked})
                except httpx.HTTPError as error:
                    errors.append(type(error).__name__)
                    continue
                asked += 1
                if answer.status_code in (429, 503) and "retry-after" in answer.headers:
                    refused += 1
                    await asyncio.sleep(float(answer.headers["retry-after"]))
                elif answer.status_code != 200:
                    errors.append(f"{answer.status_code} {answer.text[:200]}")
                else:
                    latencies.append(time.perf_counter() - started)
                    tokens += answer.json()["usage"]["completion_tokens"]
                    ids.append(answer.json()["id"])

    started = time.monotonic()
    await asyncio.gather(*(client(number) for number in range(clients)))
    elapsed = time.monotonic() - started
    cuts = statistics.quantiles(latencies, n=20) if len(latencies) > 1 else [float("nan")] * 19
    return {
        "clients": clients,
        "seconds": round(elapsed, 1),
        "requests": len(latencies),
        "tokens_per_second": round(tokens / elapsed, 1),
        "latency_seconds": {"p50": round(cuts[9], 3), "p95": round(cuts[18], 3)},
        "refused_with_retry_after": refused,
        "errors": errors[:10],
        "num_errors": len(errors),
        "doubled": len(ids) - len(set(ids)),
    }


@contextlib.contextmanager
def served(checkpoint: str) -> Iterator[str]:
    """The URL of a service by `dlm-ray serve`, on Ray Serve."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dlm_ray", "serve", checkpoint, "--port", str(port), "--json"]
    command += [f"engine.slots={SLOTS}", "name=bench", "replicas.cpus=1", "limits.requests_per_key=1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the service did not start"
        yield json.loads(line)["url"]
    finally:
        process.terminate()
        process.wait(timeout=120)


def main() -> None:
    """Measures and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint of blocks of 16 tokens")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=SLOTS)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--repetitions", type=int, default=5)
    asked = parser.parse_args()
    model = load(asked.checkpoint)
    assert model.sampled_as().block_tokens == BLOCK_TOKENS, f"the checkpoint has blocks of {model.sampled_as().block_tokens}"
    found: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "dlm_ray.evaluation.speed_serving", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": {
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "device": str(model.device),
        },
        "load_average_before": os.getloadavg()[0],
        "gain_over_one_slot": gain(model, asked.repetitions),
        "engine_directly_tokens_per_second": round(direct(model, asked.seconds / 4), 1),
    }
    with served(asked.checkpoint) as url:
        asyncio.run(load_test(url, "bench", asked.clients, 5))  # warms up
        found["over_http"] = asyncio.run(load_test(url, "bench", asked.clients, asked.seconds))
    again = round(direct(model, asked.seconds / 4), 1)
    found["engine_directly_again_tokens_per_second"] = again
    best = max(again, found["engine_directly_tokens_per_second"])
    found["http_over_engine"] = round(found["over_http"]["tokens_per_second"] / best, 3)
    asked.out.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
