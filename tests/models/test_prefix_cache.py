"""Prompts with equal prefixes: the same output with fewer calls, and the same bits with fixed shapes."""

import numpy as np
import pytest
import torch
from helpers.networks import LENGTH, RULES, VOCAB, build, denoiser_of

from dlm_ray.diffusion.samplers.blocks import BlockSampler
from dlm_ray.diffusion.samplers.requests import Request

SHARED = [0, *np.random.default_rng(7).integers(1, VOCAB, 12).tolist()]


def sampler_of(denoiser, *, num_slots=4, block_tokens=4, prefix_bytes=2**20, fixed_shapes=False, rule="ancestral"):
    options = {"block_tokens": block_tokens, "capacity_tokens": LENGTH, "num_slots": num_slots, "num_steps": 5}
    return BlockSampler(denoiser, RULES[rule], prefix_bytes=prefix_bytes, fixed_shapes=fixed_shapes, **options)


def prompts_of(count):
    """Return prompts with common prefixes of every length, equal prompts, and unrelated prompts."""
    random = np.random.default_rng(8)
    for number in range(count):
        own = random.integers(1, VOCAB, number % 4).tolist()
        yield SHARED[: 13 - 4 * (number % 3)] + own if number % 5 else [0, *own, *own]


@torch.no_grad()
def write(sampler, requests):
    """Requests that come when there is room, several at a time."""
    waiting = list(requests)
    while waiting or sampler.num_active:
        free = len(sampler._tensors) - sampler.num_active
        if waiting and free:
            sampler.add(waiting[:free])
            del waiting[:free]
        sampler.tick()
    by_number = {text.request.number: text for text in sampler.finished}
    return [by_number[request.number] for request in requests]


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize(("shift", "block_tokens"), [(True, 1), (True, 4), (False, 4), (False, 2)])
def test_the_prefix_cache_does_not_change_the_output(shift, block_tokens, fixed_shapes):
    denoiser = denoiser_of("llama", shift)
    requests = [Request(prompt, 9, number, 3) for number, prompt in enumerate(prompts_of(24))]
    samplers = [
        sampler_of(denoiser, block_tokens=block_tokens, prefix_bytes=size, fixed_shapes=fixed_shapes)
        for size in (0, 2**20)
    ]
    without, with_it = (write(sampler, requests) for sampler in samplers)
    assert [text.ids for text in with_it] == [text.ids for text in without]
    assert sum(text.num_cached_tokens for text in with_it) > 4 * len(SHARED)
    for one, other in zip(with_it, without, strict=True):
        assert one.num_cache_calls <= other.num_cache_calls
    for text in with_it:
        assert 0 <= text.num_cached_tokens <= len(text.request.prompt) // block_tokens * block_tokens
    assert all(text.num_cached_tokens == 0 for text in without)


@torch.no_grad()
def test_requests_with_a_shared_prompt_need_one_call_for_it():
    denoiser = denoiser_of("llama")
    sampler = sampler_of(denoiser)
    sampler.add([Request(SHARED[:12], 4, number) for number in range(3)])
    assert sampler.num_cache_calls == 1
    sampler.add([Request(SHARED[:12], 4, 3)])
    assert sampler.num_cache_calls == 1
    assert [slot.sequence.num_cached_tokens for slot in sampler._slots] == [0, 12, 12, 12]
    assert [slot.sequence.num_cache_calls for slot in sampler._slots] == [1, 0, 0, 0]


@torch.no_grad()
def test_with_fixed_shapes_restored_keys_and_values_have_the_bits_of_computed_ones():
    """In float32, where another shape of a call is another rounding."""
    denoiser = build("llama", shift=True)[0].requires_grad_(False)
    longer = [*SHARED, *SHARED[1:9]]
    fresh, used = (sampler_of(denoiser, prefix_bytes=size, fixed_shapes=True) for size in (0, 2**20))
    for number, prompt in enumerate((SHARED, longer)):  # the second continues the cached prefix of the first
        used.add([Request(prompt, 3, number)])
    fresh.add([Request([0, 5, 6], 3, 2)])
    fresh.add([Request(longer, 3, 1)])
    assert used._slots[1].sequence.num_cached_tokens == 12
    assert torch.equal(used.cache.save(1, 0, 20), fresh.cache.save(1, 0, 20))
    assert torch.equal(used.cache.last_rows[1], fresh.cache.last_rows[1])
    for sampler in (fresh, used):
        write(sampler, [])
    [own], [other] = ([text.ids for text in sampler.finished if text.request.number == 1] for sampler in (fresh, used))
    assert own == other


def test_the_output_is_the_same_beyond_the_context_and_with_little_cache_memory():
    denoiser = denoiser_of("qwen2")
    requests = [Request(prompt, 30, number, 3) for number, prompt in enumerate(prompts_of(12))]
    one_piece = sampler_of(denoiser)
    write(one_piece, [Request(SHARED[:4], 1)])
    room = one_piece._encoder.prefixes.num_bytes
    tight = sampler_of(denoiser, prefix_bytes=2 * room)
    assert [text.ids for text in write(tight, requests)] == [
        text.ids for text in write(sampler_of(denoiser, prefix_bytes=0), requests)
    ]
    assert 0 < tight._encoder.prefixes.num_bytes <= 2 * room
