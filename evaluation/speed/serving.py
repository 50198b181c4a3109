"""The cost of serving: the gain of 32 slots, the prefix cache, HTTP over the engine, and texts alone and in a batch.

The network has random weights, so its texts mean nothing, and each network call accepts one token of every block, the
least possible. Everything runs on one thread, in this process and in the replica, because the clients and the HTTP
ingress need the other cores.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from dlm_ray.evaluation.speed import load_test
from dlm_ray.evaluation.speed.load_test import NUM_CLIENTS
from dlm_ray.evaluation.speed.networks import BLOCK_TOKENS, CONTEXT, random_denoiser
from dlm_ray.evaluation.speed.timing import interleaved, paired_ratios, rounded_medians, timed
from safetensors.torch import save_file
from torch import Tensor

from dlm_ray.checkpoint.description import KEY as DESCRIPTION_KEY
from dlm_ray.checkpoint.description import Description
from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.recipe import Architecture
from dlm_ray.config.sampling import Sampling
from dlm_ray.config.server import EngineSettings
from dlm_ray.data.tokenizer import identity, load_tokenizer, train_tokenizer
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.generation.loading import load
from dlm_ray.generation.sampling import resolve_sampling
from dlm_ray.generation.text_model import TextModel
from dlm_ray.serving.engine import Engine
from dlm_ray.serving.jobs import Job

SLOTS = 32
GAIN_PROMPT_TOKENS, SHARED_PROMPT_TOKENS = 64, 768
TEMPERATURES = (1.0, 0.0)
WARM_UP_SECONDS = 5.0


def measure(architecture: Architecture, vocab_size: int, repetitions: int, seconds: float) -> JsonObject:
    """Return all measurements for a network of this architecture.

    Args:
        architecture: its context is replaced by CONTEXT.
        vocab_size: V, without the mask token.
        repetitions: rounds after the warm-up.
        seconds: how long clients send new requests.
    """
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder), architecture, vocab_size)
        model = load(checkpoint)
        return {
            "parameters": sum(parameter.numel() for parameter in model.denoiser.parameters()),
            "slots": SLOTS,
            "block_tokens": BLOCK_TOKENS,
            "threads": torch.get_num_threads(),
            "gain_over_one_slot": _gain_over_one_slot(model, repetitions),
            "first_token_of_a_shared_prompt": _shared_prompt(model, vocab_size, repetitions),
            "load": _load(model, checkpoint, vocab_size, seconds),
            "agreement_alone_and_among_31_others": _agreement(model, vocab_size),
        }


def write_checkpoint(folder: Path, architecture: Architecture, vocab_size: int) -> Path:
    """Write an export of a block model with random weights, whose tokens are made of digits."""
    denoiser = random_denoiser(architecture, vocab_size, torch.device("cpu"))
    names = [name for name, _ in denoiser.network.named_parameters()]
    save_file({name: denoiser.network.get_parameter(name).detach() for name in names}, folder / "model.safetensors")
    train_tokenizer([" ".join(map(str, range(2 * vocab_size)))], vocab_size).save_pretrained(str(folder))
    description = Description(
        objective="block",
        is_causal=False,
        capabilities={"sequence_length": CONTEXT, "document_mask": True, "block_tokens": BLOCK_TOKENS},
        sampling=Sampling(),
        tokenizer=identity(load_tokenizer(str(folder))).as_dict(),
    )
    fields = {
        **denoiser.network.config.to_dict(),
        "is_causal": False,
        "mask_token_id": vocab_size,
        "shift": False,
        DESCRIPTION_KEY: description.model_dump(mode="json"),
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def _job(model: TextModel, prompt: Sequence[int], num_tokens: int, seed: int, temperature: float | None = None) -> Job:
    """Return the engine's job for a request that is not streamed."""
    params = resolve_sampling(
        {} if temperature is None else {"temperature": temperature}, model.sampling_target(), num_tokens
    )
    prompt_ids = [model.tokenizer_identity.start_id, *prompt]
    return Job("measured", prompt_ids, num_tokens, params, seed=seed, is_streamed=False)


def _run_all(engine: Engine) -> dict[Job, str]:
    """Tick the engine until every job is finished and return the texts."""
    texts: dict[Job, str] = {}
    while engine.num_active or engine.waiting:
        for update in engine.tick():
            texts[update.job] = texts.get(update.job, "") + update.text
    return texts


@torch.no_grad()
def _gain_over_one_slot(model: TextModel, repetitions: int) -> JsonObject:
    """Return the gain in tokens/s of 32 texts at once over one at a time, in the engine and in its bare forwards.

    Every text has one block. The bare forwards are the network calls that the engine cannot avoid.
    """

    def engine_rate(num_texts: int) -> float:
        engine = Engine(model, EngineSettings(slots=num_texts, prefix_cache_mib=0))
        prompt = [5] * (GAIN_PROMPT_TOKENS - 1)
        engine.submit([_job(model, prompt, BLOCK_TOKENS, seed) for seed in range(num_texts)])
        return num_texts / timed(lambda: _run_all(engine), model.device)

    def bare_rate(num_texts: int) -> float:
        return num_texts / timed(lambda: _bare_forwards(model, num_texts), model.device)

    measures = {"engine": engine_rate, "bare forwards": bare_rate}
    cases: dict[str, Callable[[int], float]] = {
        f"{name} {num_texts}": lambda _, rate=rate, num_texts=num_texts: rate(num_texts)  # type: ignore[misc]
        for num_texts in (1, SLOTS)
        for name, rate in measures.items()
    }
    rates = interleaved(cases, repetitions)  # texts per second
    gains = {name: paired_ratios(rates[f"{name} {SLOTS}"], rates[f"{name} 1"]) for name in measures}
    engine_gain, bare_gain = (statistics.median(values) for values in gains.values())
    return {
        "tokens_per_second": {
            name: {
                str(num_texts): round(BLOCK_TOKENS * statistics.median(rates[f"{name} {num_texts}"]), 2)
                for num_texts in (1, SLOTS)
            }
            for name in measures
        },
        "gain": rounded_medians(gains, 3),
        "share_of_the_bare_gain": round(engine_gain / bare_gain, 3),
        "shares": [round(share, 3) for share in paired_ratios(gains["engine"], gains["bare forwards"])],
    }


def _bare_forwards(model: TextModel, batch: int) -> None:
    """Run the network calls of a batch of texts, and only take the largest logit of each masked position."""
    cache = model.denoiser.new_cache(batch, CONTEXT)
    visibility = Visibility("bidirectional", block_tokens=BLOCK_TOKENS)
    prompts = torch.zeros(batch, GAIN_PROMPT_TOKENS, dtype=torch.int64, device=model.device)
    hidden = model.denoiser.hidden(prompts, visibility, cache)
    for slot in range(batch):
        cache.commit(slot, GAIN_PROMPT_TOKENS, hidden[slot, -1])
    ids = torch.zeros(batch, BLOCK_TOKENS, dtype=torch.int64, device=model.device)
    for num_masked in range(BLOCK_TOKENS, 0, -1):
        hidden = model.denoiser.hidden(ids, visibility, cache)
        model.denoiser.reduce_logits(hidden[:, :num_masked].flatten(0, 1), _argmax)


def _argmax(logits: Tensor) -> Tensor:
    """Return the most probable token of each row of logits."""
    return logits.argmax(-1)


@torch.no_grad()
def _shared_prompt(model: TextModel, vocab_size: int, repetitions: int) -> JsonObject:
    """Return the seconds to the first token of a single request, with and without a prefix cache.

    All prompts share all tokens but the last, so the cache holds them from the warm-up round on.
    """
    engines = {
        "nothing kept": Engine(model, EngineSettings(slots=SLOTS, prefix_cache_mib=0)),
        "kept": Engine(model, EngineSettings(slots=SLOTS)),
    }
    shared = np.random.default_rng(0).integers(1, vocab_size, SHARED_PROMPT_TOKENS).tolist()

    def first_tick(engine: Engine, number: int) -> float:
        engine.submit([_job(model, [*shared, number + 1], 1, number)])
        elapsed = timed(engine.tick, model.device)
        _run_all(engine)
        return elapsed

    cases: dict[str, Callable[[int], float]] = {
        name: lambda number, engine=engine: first_tick(engine, number)  # type: ignore[misc]
        for name, engine in engines.items()
    }
    seconds = interleaved(cases, repetitions)
    return {
        "shared_tokens": SHARED_PROMPT_TOKENS,
        "seconds": rounded_medians(seconds, 4),
        "ratio": round(statistics.median(paired_ratios(seconds["kept"], seconds["nothing kept"])), 4),
    }


def _load(model: TextModel, checkpoint: Path, vocab_size: int, seconds: float) -> JsonObject:
    """Return the throughput of the same requests over HTTP, and in this process's engine before and after.

    The service runs all the time and is idle while the engine of this process is measured.
    """
    with load_test.served(checkpoint, SLOTS, int(model.device.type == "cuda")) as url:
        load_test.run(url, vocab_size, min(WARM_UP_SECONDS, seconds))
        before = _engine_throughput(model, vocab_size, seconds)
        over_http = load_test.run(url, vocab_size, seconds)
        after = _engine_throughput(model, vocab_size, seconds)
    return {
        "over_http": over_http,
        "engine_directly_tokens_per_second": [round(before, 2), round(after, 2)],
        "http_over_engine": round(over_http["tokens_per_second"] / statistics.mean([before, after]), 3),
    }


def _engine_throughput(model: TextModel, vocab_size: int, seconds: float) -> float:
    """Return the engine's tokens/s with NUM_CLIENTS clients that send their next request when a text is finished."""
    engine = Engine(model, EngineSettings(slots=SLOTS))
    clients: dict[Job, tuple[int, int]] = {}

    def submit(client: int, number: int) -> None:
        request = load_test.load_request(client, number, vocab_size)
        job = _job(model, request.prompt, request.num_tokens, request.seed)
        clients[job] = client, number
        engine.submit([job])

    num_tokens, started = 0, time.monotonic()
    for client in range(NUM_CLIENTS):
        submit(client, 0)
    while clients:
        for update in engine.tick():
            if update.finish_reason is not None:
                num_tokens += update.num_tokens
                client, number = clients.pop(update.job)
                if time.monotonic() < started + seconds:
                    submit(client, number + 1)
    return num_tokens / (time.monotonic() - started)


def _agreement(model: TextModel, vocab_size: int) -> JsonObject:
    """Return the share of texts that are identical alone and in a batch of 32, without batch-invariant shapes."""
    same = {}
    for temperature in TEMPERATURES:
        engine = Engine(model, EngineSettings(slots=SLOTS))
        requests = [load_test.load_request(client, 0, vocab_size) for client in range(SLOTS)]
        jobs = [_job(model, request.prompt, request.num_tokens, request.seed, temperature) for request in requests]
        engine.submit(jobs)
        together = _run_all(engine)
        num_same = 0
        for job in jobs:
            engine.submit([job])
            num_same += _run_all(engine)[job] == together[job]
        same[f"temperature {temperature:g}"] = round(num_same / len(jobs), 3)
    return {
        "texts": SLOTS,
        "tokens_each": list(load_test.GENERATED_TOKENS),
        "dtype": str(model.denoiser.embedding.dtype).removeprefix("torch."),
        "same": same,
    }
