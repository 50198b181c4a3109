"""Generates a batch of requests block by block, from the first call to the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dlm_ray.diffusion.denoiser import Denoiser
from dlm_ray.diffusion.samplers.blocks import BlockSampler
from dlm_ray.diffusion.samplers.requests import GenerationOutput, Request
from dlm_ray.diffusion.samplers.rules import Canvas, SelectionRule


@dataclass(frozen=True)
class GenerationBatch:
    """Finished requests in the order of the call, and the network calls that the batch took."""

    texts: list[GenerationOutput]
    num_denoising_calls: int
    """Network calls that denoised the block of at least one request; they may have committed blocks of others."""
    num_cache_calls: int
    """Network calls that only filled the cache: with prompts, finished blocks, and context that was encoded again."""


@torch.no_grad()
def generate_blocks(
    denoiser: Denoiser,
    requests: Sequence[Request],
    rule: SelectionRule,
    *,
    block_tokens: int,
    context_tokens: int,
    on_step: Callable[[int, int, Canvas], None] | None = None,
    on_tick: Callable[[BlockSampler], None] | None = None,
    **options: object,
) -> GenerationBatch:
    """Generate all requests in one batch.

    Args:
        denoiser, rule, block_tokens, options: as in `BlockSampler`.
        context_tokens: length of the context in positions, a multiple of K; the cache is no larger than the longest
            request needs.
        requests: the requests, whose prompts and lengths may differ.
        on_step: called after each call with (blocks done, blocks, canvas of the current blocks); a sequence that stops
            early has fewer blocks.
        on_tick: called after each call with the sampler.
    """
    ends = [len(request.prompt) + request.length_tokens for request in requests]
    sampler = BlockSampler(
        denoiser,
        rule,
        block_tokens=block_tokens,
        capacity_tokens=min(context_tokens, block_tokens * max(2, *(-(-end // block_tokens) for end in ends))),
        num_slots=sum(request.candidates for request in requests),
        **options,  # type: ignore[arg-type]
    )
    sampler.add(requests)
    num_blocks = sum(
        -(-end // block_tokens) - len(request.prompt) // block_tokens
        for request, end in zip(requests, ends, strict=True)
    )
    while sampler.num_active:
        sampler.tick()
        if on_step is not None:
            on_step(sampler.num_blocks, num_blocks, sampler.canvas())
        if on_tick is not None:
            on_tick(sampler)
    by_request = {id(output.request): output for output in sampler.finished}
    outputs = [by_request[id(request)] for request in requests]
    return GenerationBatch(outputs, sampler.num_denoising_calls, sampler.num_cache_calls)
