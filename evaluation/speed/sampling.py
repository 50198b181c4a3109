"""What block sampling costs over a KV cache, as ratios in one run: the engine over bare forwards, blocks over AR decoding, and the length of the text.

The network has random weights, so how many tokens a call accepts is not measured but given: none above the threshold (one a call), or all (a block a
call); the ratio of call times says how many tokens a call has to accept to be as fast as AR.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_ray.diffusion.samplers.blocks import BlockSampler, write
from dlm_ray.diffusion.samplers.requests import Request
from dlm_ray.diffusion.samplers.rules import Confidence, LeftToRight, Threshold
from dlm_ray.diffusion.schedules import Polynomial
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.models import families, parallel
from dlm_ray.models.denoiser import HuggingFaceDenoiser

CONTEXT, BLOCK_TOKENS = 1024, 16
COMMITTED = (128, 256, 512, 896)
SIZES, CALL_BATCHES, DECODING_BATCHES = (1, 4, 8, 16, 32), (1, 8), (1, 8, 32)
DECODED_TOKENS = 32


@torch.no_grad()
def measure(architecture: Any, vocab_size: int, repetitions: int, device: torch.device) -> dict[str, Any]:
    """All ratios for a network of this architecture.

    Args:
        architecture: `model.architecture` of a recipe; its context is set to CONTEXT.
        vocab_size: V, without the mask.
        repetitions: of every call.
        device: of the network; on CUDA it is in bfloat16.
    """
    config = families.scratch_config(architecture.model_copy(update={"max_positions": CONTEXT}), vocab_size + 1, 0, 0)
    denoiser = parallel.build(config, vocab_size, shift=False)
    parallel.materialize(denoiser, device)
    parallel.initialize(denoiser, seed=0)
    denoiser = denoiser.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    return {
        "engine_over_bare_forward": _overhead(denoiser, repetitions, device),
        "by_committed_tokens": _by_length(denoiser, repetitions, device),
        "denoising_call_over_ar_decoding_call": _by_size(denoiser, repetitions, device),
        "decoding": _decoding(denoiser, device),
    }


def _overhead(denoiser: HuggingFaceDenoiser, repetitions: int, device: torch.device) -> dict[str, Any]:
    """Ticks of the engine beside bare forwards of the same blocks and as many rows of logits, call by call in turn."""
    prompt = [0] * (4 * BLOCK_TOKENS)
    ratios, shares = [], []
    for number in range(repetitions + 1):
        engine = BlockSampler(
            denoiser,
            Confidence(Polynomial()),
            block_tokens=BLOCK_TOKENS,
            capacity_tokens=CONTEXT,
            num_slots=1,
            num_steps=BLOCK_TOKENS,
        )
        engine.add([Request(prompt, BLOCK_TOKENS, seed=number)])
        cache = _filled(denoiser, 1, len(prompt))
        ours = bare = 0.0
        for num_rows in range(BLOCK_TOKENS, 0, -1):  # a token is revealed a call
            ours += timed(engine.tick, device)
            bare += timed(lambda own=cache, n=num_rows: _call(denoiser, own, 1, BLOCK_TOKENS, n), device)
        if number:  # the first pays for warming up
            ratios.append(ours / bare)
            shares.append(bare / BLOCK_TOKENS)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(edge, 3) for edge in statistics.quantiles(ratios, n=4)],
        "bare_call_seconds": round(statistics.median(shares), 5),
    }


def _by_length(denoiser: HuggingFaceDenoiser, repetitions: int, device: torch.device) -> dict[str, Any]:
    """One denoising call of a block behind so many tokens, and how much of it is attention's own kernel."""
    caches = {length: _filled(denoiser, 1, length) for length in COMMITTED}
    calls: dict[int, list[float]] = {length: [] for length in COMMITTED}
    kernels: dict[int, list[float]] = {length: [] for length in COMMITTED}
    for number in range(repetitions + 1):
        for length, cache in caches.items():
            call = timed(lambda own=cache: _call(denoiser, own, 1, BLOCK_TOKENS, BLOCK_TOKENS), device)
            kernel = timed(lambda n=length: _attention(denoiser, n + BLOCK_TOKENS, device), device)
            if number:
                calls[length].append(call)
                kernels[length].append(kernel)
    seconds = {length: statistics.median(own) for length, own in calls.items()}
    attention = {length: statistics.median(own) for length, own in kernels.items()}
    rest = {length: seconds[length] - attention[length] for length in COMMITTED}
    return {
        "call_seconds": {str(length): round(value, 5) for length, value in seconds.items()},
        "attention_seconds": {str(length): round(value, 5) for length, value in attention.items()},
        "rest_of_the_longest_over_the_shortest": round(rest[COMMITTED[-1]] / rest[COMMITTED[0]], 3),
    }


def _by_size(denoiser: HuggingFaceDenoiser, repetitions: int, device: torch.device) -> dict[str, Any]:
    """One denoising call with logits for the whole block, over one AR call of one token, behind 256 tokens."""
    found = {}
    for batch in CALL_BATCHES:
        cache = _filled(denoiser, batch, 256)
        seconds: dict[int, list[float]] = {size: [] for size in (0, *SIZES)}
        for number in range(repetitions + 1):
            for size in seconds:
                positions = size or 1  # 0 stands for AR
                elapsed = timed(lambda own=cache, rows=batch, n=positions: _call(denoiser, own, rows, n, n), device)
                if number:
                    seconds[size].append(elapsed)
        ratios = {size: [own / ar for own, ar in zip(seconds[size], seconds[0], strict=True)] for size in SIZES}
        found[f"batch {batch}"] = {f"K={size}": round(statistics.median(own), 3) for size, own in ratios.items()}
    return found


def _decoding(denoiser: HuggingFaceDenoiser, device: torch.device) -> dict[str, Any]:
    """Tokens a second of whole texts: AR greedy with the cache, and blocks whose calls accept one token, or all."""
    shifted = _shifted(denoiser)
    ways: dict[str, Callable[[int], Any]] = {
        "ar": lambda batch: _write(shifted, LeftToRight(), 1, batch),
        "block, one token a call": lambda batch: _write(denoiser, Threshold(1.0), BLOCK_TOKENS, batch),
        "block, all tokens a call": lambda batch: _write(denoiser, Threshold(0.0), BLOCK_TOKENS, batch),
    }
    found: dict[str, Any] = {}
    for batch in DECODING_BATCHES:
        rates = {}
        for name, params in ways.items():
            elapsed = timed(lambda run=params, rows=batch: run(rows), device)
            rates[name] = batch * DECODED_TOKENS / elapsed
        one, every = rates["block, one token a call"], rates["block, all tokens a call"]
        # Seconds a token are a + b / n with n tokens a call, as both ends say; where that is AR's rate:
        per_call = (1 / one - 1 / every) / (1 - 1 / BLOCK_TOKENS)
        fixed = 1 / one - per_call
        left = 1 / rates["ar"] - fixed
        found[f"batch {batch}"] = {
            "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
            "over_ar": {name: round(rate / rates["ar"], 3) for name, rate in rates.items()},
            "tokens_a_call_to_be_as_fast_as_ar": round(per_call / left, 2) if left > per_call / BLOCK_TOKENS else None,
        }
    return found


def _write(denoiser: Any, rule: Any, block_tokens: int, batch: int) -> None:
    requests = [Request([0] * 32, DECODED_TOKENS, number=number) for number in range(batch)]
    write(
        denoiser,
        requests,
        rule,
        block_tokens=block_tokens,
        context_tokens=CONTEXT,
        num_steps=BLOCK_TOKENS,
        temperature=0.0,
    )


def _shifted(denoiser: HuggingFaceDenoiser) -> Any:
    """The same network as an AR model."""

    class Shifted:
        mask_id = None

        def __getattr__(self, name: str) -> Any:
            return getattr(denoiser, name)

        def rows_for(self, positions: Tensor) -> Tensor:
            return positions - 1

    return Shifted()


def _filled(denoiser: HuggingFaceDenoiser, batch: int, length: int) -> Any:
    """A cache with so many committed tokens in each slot."""
    cache = denoiser.new_cache(batch, CONTEXT)
    ids = torch.zeros(batch, length, dtype=torch.int64, device=cache.last_rows.device)
    hidden = denoiser.hidden(ids, Visibility("bidirectional", block_tokens=BLOCK_TOKENS), cache)
    for slot in range(batch):
        cache.commit(slot, length, hidden[slot, -1])
    return cache


def _call(denoiser: HuggingFaceDenoiser, cache: Any, batch: int, block_tokens: int, num_rows: int) -> None:
    """A bare forward of a block behind the cache, and the logits of some rows of each text."""
    ids = torch.zeros(batch, block_tokens, dtype=torch.int64, device=cache.last_rows.device)
    hidden = denoiser.hidden(ids, Visibility("bidirectional", block_tokens=block_tokens), cache)
    denoiser.reduce_logits(hidden[:, :num_rows].flatten(0, 1), lambda logits: logits.argmax(-1))


def _attention(denoiser: HuggingFaceDenoiser, num_keys: int, device: torch.device) -> None:
    """The attention kernel alone, once a layer, over a view of a cache as the layers get it."""
    config = denoiser.network.config
    size = config.hidden_size // config.num_attention_heads
    dtype = denoiser.embedding.dtype
    query = torch.zeros(1, BLOCK_TOKENS, config.num_attention_heads, size, device=device, dtype=dtype).transpose(1, 2)
    pair = torch.zeros(2, 1, config.num_key_value_heads, CONTEXT, size, device=device, dtype=dtype)
    for _ in range(config.num_hidden_layers):
        F.scaled_dot_product_attention(query, pair[0, :, :, :num_keys], pair[1, :, :, :num_keys])


def timed(act: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the device is done with it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
