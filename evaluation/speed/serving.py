"""What serving costs, as ratios in one run: slots over one slot beside bare forwards, HTTP beside the engine called directly; and how often company decides.

The network has random weights, so nothing is said of text, and a call of the network accepts one token of each block: the least. Everything runs on one
thread, in this process and in the replica, because clients and ingress need the others.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dlm_ray.evaluation.speed import load_test
from dlm_ray.evaluation.speed.load_test import CLIENTS
from dlm_ray.evaluation.speed.sampling import BLOCK_TOKENS, CONTEXT, timed
from safetensors.torch import save_file
from torch import Tensor

from dlm_ray.config.server import Engine as Settings
from dlm_ray.data.tokenizer import train_tokenizer
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.generation.loading import load
from dlm_ray.generation.sampling import resolve_sampling
from dlm_ray.generation.text_model import TextModel
from dlm_ray.models import families, parallel
from dlm_ray.serving.engine import Engine
from dlm_ray.serving.jobs import Job

SLOTS = 32
GAIN_PROMPT_TOKENS, SHARED_TOKENS = 64, 768
TEMPERATURES = (1.0, 0.0)


def measure(architecture: Any, vocab_size: int, repetitions: int, seconds: float) -> dict[str, Any]:
    """All of it for a network of this architecture.

    Args:
        architecture: `model.architecture` of a recipe; its context is set to CONTEXT.
        vocab_size: V, without the mask.
        repetitions: of what is compared text by text.
        seconds: that clients go on asking.
    """
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = _checkpoint(Path(folder), architecture, vocab_size)
        model = load(checkpoint)
        return {
            "parameters": sum(parameter.numel() for parameter in model.denoiser.parameters()),
            "slots": SLOTS,
            "block_tokens": BLOCK_TOKENS,
            "threads": torch.get_num_threads(),
            "gain_over_one_slot": _gain(model, repetitions),
            "first_token_of_a_shared_prompt": _first_token(model, vocab_size, repetitions),
            "load": _load(model, checkpoint, vocab_size, seconds),
            "agreement_alone_and_among_31_others": _agreement(model, vocab_size),
        }


def _checkpoint(folder: Path, architecture: Any, vocab_size: int) -> Path:
    """A Hugging Face folder of a block model with random weights; its tokens are made of numbers."""
    config = families.scratch_config(architecture.model_copy(update={"max_positions": CONTEXT}), vocab_size + 1, 0, 0)
    denoiser = parallel.build(config, vocab_size, shift=False)
    parallel.materialize(denoiser, torch.device("cpu"))
    parallel.initialize(denoiser, seed=0)
    names = [name for name, _ in denoiser.network.named_parameters()]
    save_file({name: denoiser.network.get_parameter(name).detach() for name in names}, folder / "model.safetensors")
    fields = {
        **config.to_dict(),
        "is_causal": False,
        "block_tokens": BLOCK_TOKENS,
        "mask_token_id": vocab_size,
        "shift": False,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    train_tokenizer([" ".join(map(str, range(2 * vocab_size)))], vocab_size).save_pretrained(str(folder))
    return folder


def _job(model: TextModel, prompt: Sequence[int], num_tokens: int, seed: int, **options: Any) -> Job:
    """As a request that is not streamed becomes one."""
    ids = [model.tokenizer_identity.start_id, *prompt]
    return Job(
        "measured",
        ids,
        num_tokens,
        resolve_sampling({**options}, model.sampled_as(), num_tokens),
        seed=seed,
        is_streamed=False,
    )


@torch.no_grad()
def _gain(model: TextModel, repetitions: int) -> dict[str, Any]:
    """Texts of one block each, by the engine and by the bare forwards that they cannot do without, in turn: 32 at once over one after the other."""
    ours: dict[int, list[float]] = {1: [], SLOTS: []}
    bare: dict[int, list[float]] = {1: [], SLOTS: []}
    for number in range(repetitions + 1):
        for batch in ours:
            engine = Engine(model, Settings(slots=batch, prefix_cache_mib=0))
            prompt = [5] * (GAIN_PROMPT_TOKENS - 1)
            engine.submit([_job(model, prompt, BLOCK_TOKENS, seed) for seed in range(batch)])
            engine_seconds = timed(lambda own=engine: _finish(own), model.device)
            bare_seconds = timed(lambda rows=batch: _bare(model, rows), model.device)
            if number:  # the first pays for warming up
                ours[batch].append(batch / engine_seconds)
                bare[batch].append(batch / bare_seconds)
    gains = {
        name: [many / one for many, one in zip(own[SLOTS], own[1], strict=True)]
        for name, own in (("engine", ours), ("bare forwards", bare))
    }
    return {
        "tokens_per_second": {
            name: {str(batch): round(BLOCK_TOKENS * statistics.median(rates), 2) for batch, rates in own.items()}
            for name, own in (("engine", ours), ("bare forwards", bare))
        },
        "gain": {name: round(statistics.median(own), 3) for name, own in gains.items()},
        "share_of_the_bare_gain": round(
            statistics.median(gains["engine"]) / statistics.median(gains["bare forwards"]), 3
        ),
        "shares": [round(own / other, 3) for own, other in zip(*gains.values(), strict=True)],
    }


def _bare(model: TextModel, batch: int) -> None:
    """The network calls of such texts and the largest logit of each masked position; nothing is drawn, kept or told."""
    cache = model.denoiser.new_cache(batch, CONTEXT)
    visibility = Visibility("bidirectional", block_tokens=BLOCK_TOKENS)
    hidden = model.denoiser.hidden(
        torch.zeros(batch, GAIN_PROMPT_TOKENS, dtype=torch.int64, device=model.device), visibility, cache
    )
    for slot in range(batch):
        cache.commit(slot, GAIN_PROMPT_TOKENS, hidden[slot, -1])
    ids = torch.zeros(batch, BLOCK_TOKENS, dtype=torch.int64, device=model.device)
    for num_masked in range(BLOCK_TOKENS, 0, -1):
        hidden = model.denoiser.hidden(ids, visibility, cache)
        model.denoiser.reduce_logits(hidden[:, :num_masked].flatten(0, 1), _largest)


def _largest(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def _finish(engine: Engine) -> dict[Job, str]:
    """The text of every job."""
    texts: dict[Job, str] = {}
    while engine.num_active or engine.waiting:
        for update in engine.tick():
            texts[update.job] = texts.get(update.job, "") + update.text
    return texts


@torch.no_grad()
def _first_token(model: TextModel, vocab_size: int, repetitions: int) -> dict[str, Any]:
    """Until the first tick of a request is over, alone: behind a prompt that others had, of which only the end is new, and where nothing is kept."""
    engines = {
        "nothing kept": Engine(model, Settings(slots=SLOTS, prefix_cache_mib=0)),
        "kept": Engine(model, Settings(slots=SLOTS)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    shared = np.random.default_rng(0).integers(1, vocab_size, SHARED_TOKENS).tolist()
    for number in range(repetitions + 1):
        for name, engine in engines.items():
            engine.submit([_job(model, [*shared, number + 1], 1, number)])
            elapsed = timed(engine.tick, model.device)
            _finish(engine)
            if number:  # the first pays for warming up, and is the one that the others share with
                seconds[name].append(elapsed)
    return {
        "shared_tokens": SHARED_TOKENS,
        "seconds": {name: round(statistics.median(own), 4) for name, own in seconds.items()},
        "ratio": round(
            statistics.median(own / other for own, other in zip(seconds["kept"], seconds["nothing kept"], strict=True)),
            4,
        ),
    }


def _load(model: TextModel, checkpoint: Path, vocab_size: int, seconds: float) -> dict[str, Any]:
    """The same requests by the engine of this process, over HTTP, and by the engine again; the service is up and idle while it is not asked."""
    with load_test.served(checkpoint, SLOTS, int(model.device.type == "cuda")) as url:
        load_test.run(url, vocab_size, min(5.0, seconds))  # warms up
        before = _direct(model, vocab_size, seconds)
        over_http = load_test.run(url, vocab_size, seconds)
        after = _direct(model, vocab_size, seconds)
    return {
        "over_http": over_http,
        "engine_directly_tokens_per_second": [round(before, 2), round(after, 2)],
        "http_over_engine": round(over_http["tokens_per_second"] / statistics.mean([before, after]), 3),
    }


def _direct(model: TextModel, vocab_size: int, seconds: float) -> float:
    """Tokens a second of as many clients as there are of the service, each of whom asks again when its text is finished."""
    engine = Engine(model, Settings(slots=SLOTS))
    clients: dict[Job, tuple[int, int]] = {}

    def ask(client: int, number: int) -> None:
        own = load_test.load_request(client, number, vocab_size)
        job = _job(model, own.prompt, own.num_tokens, own.seed)
        clients[job] = client, number
        engine.submit([job])

    num_tokens, started = 0, time.monotonic()
    for client in range(CLIENTS):
        ask(client, 0)
    while clients:
        for update in engine.tick():
            if update.finish_reason is not None:
                num_tokens += update.num_tokens
                client, number = clients.pop(update.job)
                if time.monotonic() < started + seconds:
                    ask(client, number + 1)
    return num_tokens / (time.monotonic() - started)


def _agreement(model: TextModel, vocab_size: int) -> dict[str, Any]:
    """Share of texts that are the same to the last character, without fixed shapes."""
    found = {}
    for temperature in TEMPERATURES:
        engine = Engine(model, Settings(slots=SLOTS))
        own = [load_test.load_request(client, 0, vocab_size) for client in range(SLOTS)]
        jobs = [_job(model, one.prompt, one.num_tokens, one.seed, temperature=temperature) for one in own]
        engine.submit(jobs)
        together = _finish(engine)
        same = 0
        for job in jobs:
            engine.submit([job])
            same += _finish(engine)[job] == together[job]
        found[f"temperature {temperature:g}"] = round(same / len(jobs), 3)
    return {
        "texts": SLOTS,
        "tokens_each": list(load_test.WRITTEN_TOKENS),
        "dtype": str(model.denoiser.embedding.dtype).removeprefix("torch."),
        "same": found,
    }
