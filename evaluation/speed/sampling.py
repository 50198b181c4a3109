"""The cost of block sampling over a KV cache: the engine, the length of the text, the size of a block, and AR decoding.

The network has random weights, so the number of tokens that a call accepts is set, not measured: either one per call
(no token passes the threshold) or a whole block per call. The ratio of the call times then gives the number of tokens
that a call must accept for block sampling to be as fast as autoregressive (AR) decoding.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from dlm_ray.evaluation.speed.networks import BLOCK_TOKENS, CONTEXT, random_denoiser
from dlm_ray.evaluation.speed.timing import interleaved, paired_ratios, rounded_medians, timed
from torch import Tensor

from dlm_ray.config.manifest_fields import JsonObject
from dlm_ray.config.recipe import Architecture
from dlm_ray.diffusion.denoiser import Cache
from dlm_ray.diffusion.samplers.blocks import BlockSampler
from dlm_ray.diffusion.samplers.generate import generate_blocks
from dlm_ray.diffusion.samplers.requests import Request
from dlm_ray.diffusion.samplers.rules import Confidence, LeftToRight, SelectionRule, Threshold
from dlm_ray.diffusion.schedules import Polynomial
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.models.denoiser import HuggingFaceDenoiser

COMMITTED_TOKENS = (128, 256, 512, 896)
BLOCK_SIZES, CALL_BATCHES, DECODING_BATCHES = (1, 4, 8, 16, 32), (1, 8), (1, 8, 32)
DECODED_TOKENS, PROMPT_TOKENS = 32, 32
_AR = 0  # stands for AR decoding among block sizes


@torch.no_grad()
def measure(architecture: Architecture, vocab_size: int, repetitions: int, device: torch.device) -> JsonObject:
    """Return all ratios for a network of this architecture.

    Args:
        architecture: its context is replaced by CONTEXT.
        vocab_size: V, without the mask token.
        repetitions: rounds after the warm-up.
        device: where the network lies; bfloat16 on CUDA, float32 on the CPU.
    """
    denoiser = random_denoiser(architecture, vocab_size, device)
    denoiser = denoiser.to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    return {
        "engine_over_bare_forward": _engine_overhead(denoiser, repetitions, device),
        "by_committed_tokens": _by_committed_tokens(denoiser, repetitions, device),
        "denoising_call_over_ar_decoding_call": _by_block_size(denoiser, repetitions, device),
        "decoding": {f"batch {batch}": _decoding(denoiser, batch, device) for batch in DECODING_BATCHES},
    }


def _engine_overhead(denoiser: HuggingFaceDenoiser, repetitions: int, device: torch.device) -> JsonObject:
    """Return the time of the sampler's ticks over bare forwards with the same blocks and numbers of logits."""
    prompt = [0] * (4 * BLOCK_TOKENS)
    ratios, call_seconds = [], []
    for number in range(repetitions + 1):
        sampler = BlockSampler(
            denoiser,
            Confidence(Polynomial()),
            block_tokens=BLOCK_TOKENS,
            capacity_tokens=CONTEXT,
            num_slots=1,
            num_steps=BLOCK_TOKENS,
        )
        sampler.add([Request(prompt, BLOCK_TOKENS, seed=number)])
        cache = _filled_cache(denoiser, 1, len(prompt))
        sampler_seconds = bare_seconds = 0.0
        for num_rows in range(BLOCK_TOKENS, 0, -1):  # each call reveals one token
            sampler_seconds += timed(sampler.tick, device)
            bare_seconds += _timed_call(denoiser, cache, 1, BLOCK_TOKENS, num_rows, device)
        if number:  # the first round warms up
            ratios.append(sampler_seconds / bare_seconds)
            call_seconds.append(bare_seconds / BLOCK_TOKENS)
    return {
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(edge, 3) for edge in statistics.quantiles(ratios, n=4)],
        "bare_call_seconds": round(statistics.median(call_seconds), 5),
    }


def _by_committed_tokens(denoiser: HuggingFaceDenoiser, repetitions: int, device: torch.device) -> JsonObject:
    """Return the time of a denoising call by the number of committed tokens, and the attention kernel's part of it."""
    cases: dict[str, Callable[[int], float]] = {}
    for length in COMMITTED_TOKENS:
        cache = _filled_cache(denoiser, 1, length)
        cases[f"call {length}"] = lambda _, cache=cache: _timed_call(  # type: ignore[misc]
            denoiser, cache, 1, BLOCK_TOKENS, BLOCK_TOKENS, device
        )
        cases[f"kernel {length}"] = lambda _, length=length: timed(  # type: ignore[misc]
            lambda: _attention(denoiser, length + BLOCK_TOKENS, device), device
        )
    medians = {name: statistics.median(values) for name, values in interleaved(cases, repetitions).items()}
    calls = {length: medians[f"call {length}"] for length in COMMITTED_TOKENS}
    kernels = {length: medians[f"kernel {length}"] for length in COMMITTED_TOKENS}
    rest = [calls[length] - kernels[length] for length in COMMITTED_TOKENS]
    return {
        "call_seconds": {str(length): round(seconds, 5) for length, seconds in calls.items()},
        "attention_seconds": {str(length): round(seconds, 5) for length, seconds in kernels.items()},
        "rest_of_the_longest_over_the_shortest": round(rest[-1] / rest[0], 3),
    }


def _by_block_size(denoiser: HuggingFaceDenoiser, repetitions: int, device: torch.device) -> JsonObject:
    """Return the time of a call with logits for a whole block over an AR call of one token, after 256 tokens."""
    result = {}
    for batch in CALL_BATCHES:
        cache = _filled_cache(denoiser, batch, 256)
        cases: dict[int, Callable[[int], float]] = {}
        for size in (_AR, *BLOCK_SIZES):
            tokens = 1 if size == _AR else size
            cases[size] = lambda _, cache=cache, batch=batch, tokens=tokens: _timed_call(  # type: ignore[misc]
                denoiser, cache, batch, tokens, tokens, device
            )
        seconds = interleaved(cases, repetitions)
        ratios = {f"K={size}": paired_ratios(seconds[size], seconds[_AR]) for size in BLOCK_SIZES}
        result[f"batch {batch}"] = rounded_medians(ratios, 3)
    return result


def _decoding(denoiser: HuggingFaceDenoiser, batch: int, device: torch.device) -> JsonObject:
    """Return the tokens/s of greedy AR decoding, and of blocks that accept one token or all tokens per call."""
    shifted = _ShiftedDenoiser(denoiser)
    decoders: dict[str, Callable[[], None]] = {
        "ar": lambda: _generate(shifted, LeftToRight(), 1, batch),
        "block, one token a call": lambda: _generate(denoiser, Threshold(1.0), BLOCK_TOKENS, batch),
        "block, all tokens a call": lambda: _generate(denoiser, Threshold(0.0), BLOCK_TOKENS, batch),
    }
    rates = {name: batch * DECODED_TOKENS / timed(decoder, device) for name, decoder in decoders.items()}
    # The seconds per token are fixed + per_call / n if a call accepts n tokens; n = 1 and n = BLOCK_TOKENS give both
    # terms.
    slowest, fastest = 1 / rates["block, one token a call"], 1 / rates["block, all tokens a call"]
    per_call = (slowest - fastest) / (1 - 1 / BLOCK_TOKENS)
    fixed = slowest - per_call
    left = 1 / rates["ar"] - fixed
    return {
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "over_ar": {name: round(rate / rates["ar"], 3) for name, rate in rates.items()},
        "tokens_a_call_to_be_as_fast_as_ar": round(per_call / left, 2) if left > per_call / BLOCK_TOKENS else None,
    }


def _generate(denoiser: Any, rule: SelectionRule, block_tokens: int, batch: int) -> None:
    """Generate DECODED_TOKENS tokens for each of `batch` prompts."""
    requests = [Request([0] * PROMPT_TOKENS, DECODED_TOKENS, number=number) for number in range(batch)]
    generate_blocks(
        denoiser,
        requests,
        rule,
        block_tokens=block_tokens,
        context_tokens=CONTEXT,
        num_steps=BLOCK_TOKENS,
        temperature=0.0,
    )


class _ShiftedDenoiser:
    """The same network as an AR model: the hidden states at i - 1 predict position i; there is no mask token."""

    mask_id = None

    def __init__(self, denoiser: HuggingFaceDenoiser):
        self._denoiser = denoiser

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def rows_for(self, positions: Tensor) -> Tensor:
        """Return the flat indices of the hidden states that predict `positions`."""
        return positions - 1


def _filled_cache(denoiser: HuggingFaceDenoiser, batch: int, length: int) -> Cache:
    """Return a cache with `length` committed tokens in each of `batch` slots."""
    cache = denoiser.new_cache(batch, CONTEXT)
    ids = torch.zeros(batch, length, dtype=torch.int64, device=cache.last_rows.device)
    hidden = denoiser.hidden(ids, Visibility("bidirectional", block_tokens=BLOCK_TOKENS), cache)
    for slot in range(batch):
        cache.commit(slot, length, hidden[slot, -1])
    return cache


def _timed_call(
    denoiser: HuggingFaceDenoiser, cache: Cache, batch: int, block_tokens: int, num_rows: int, device: torch.device
) -> float:
    """Return the seconds of a bare forward of a block after the cache, with `num_rows` rows of logits per text."""

    def call() -> None:
        ids = torch.zeros(batch, block_tokens, dtype=torch.int64, device=cache.last_rows.device)
        hidden = denoiser.hidden(ids, Visibility("bidirectional", block_tokens=block_tokens), cache)
        denoiser.reduce_logits(hidden[:, :num_rows].flatten(0, 1), lambda logits: logits.argmax(-1))

    return timed(call, device)


def _attention(denoiser: HuggingFaceDenoiser, num_keys: int, device: torch.device) -> None:
    """Run only the attention kernel, once per layer, over a view of a cache in the layout that the layers get."""
    config = denoiser.network.config
    size = config.hidden_size // config.num_attention_heads
    dtype = denoiser.embedding.dtype
    query = torch.zeros(1, BLOCK_TOKENS, config.num_attention_heads, size, device=device, dtype=dtype).transpose(1, 2)
    kv = torch.zeros(2, 1, config.num_key_value_heads, CONTEXT, size, device=device, dtype=dtype)
    for _ in range(config.num_hidden_layers):
        F.scaled_dot_product_attention(query, kv[0, :, :, :num_keys], kv[1, :, :, :num_keys])
