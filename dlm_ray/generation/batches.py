"""Samples a batch of texts with the sampler that the objective and the options need."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from dlm_ray.config.sampling import ResolvedSampling
from dlm_ray.diffusion.objectives.block import is_context_causal
from dlm_ray.diffusion.objectives.ssd_lm import SsdLm
from dlm_ray.diffusion.samplers.adjust import Adjust, banned, chained, forced
from dlm_ray.diffusion.samplers.blocks import BlockSampler
from dlm_ray.diffusion.samplers.generate import generate_blocks
from dlm_ray.diffusion.samplers.requests import LOWEST_ENTROPY_NATS, Request, Stops
from dlm_ray.diffusion.samplers.rules import Canvas, SelectionRule
from dlm_ray.diffusion.samplers.simplex import Projection, sample_blocks
from dlm_ray.diffusion.samplers.whole_canvas import CanvasOutput, sample
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.generation.progress import ProgressTracker
from dlm_ray.generation.sampling import SamplingOptions
from dlm_ray.generation.texts import GeneratedTexts, forced_tokens, masked_canvas

if TYPE_CHECKING:
    from dlm_ray.generation.text_model import TextModel


def generate(
    model: TextModel,
    params: ResolvedSampling,
    prompt_ids: list[int],
    length: int,
    suffix_ids: list[int],
    options: SamplingOptions,
) -> GeneratedTexts:
    """Sample a batch of [start] prompt [`length` tokens] suffix.

    Args:
        model: the model.
        params: the resolved options.
        prompt_ids: ids of the prompt, with or without a start token.
        length: tokens to generate.
        suffix_ids: ids after the generated tokens; only for a whole canvas.
        options: the options of the call, for those that are Python objects.
    """
    prompt = model.prompt_ids(prompt_ids)
    forbidden_ids = model.forbidden_token_ids(bool(suffix_ids), options.get("ban") or ())
    if model.objective.canvas == "simplex":
        return _sample_simplex(model, params, prompt, length, forbidden_ids, options)
    forced_ids = forced_tokens(options.get("force") or {}, model.encode, len(prompt), length)
    adjust = chained(
        banned(forbidden_ids) if forbidden_ids else None,
        options.get("adjust"),
        forced(forced_ids) if forced_ids else None,
    )
    if params.block_tokens is None:
        return _sample_canvas(model, params, prompt, length, suffix_ids, adjust, options)
    return _sample_blocks(model, params, params.block_tokens, prompt, length, adjust, options)


def _sample_simplex(
    model: TextModel,
    params: ResolvedSampling,
    prompt: list[int],
    length: int,
    forbidden_ids: list[int],
    options: SamplingOptions,
) -> GeneratedTexts:
    """Sample from an SSD-LM, block by block on the simplex."""
    denoised = sample_blocks(
        model.denoiser,
        cast(SsdLm, model.objective),  # an objective with this canvas has its methods
        _canvas(model, params, prompt, length, []),
        num_steps=params.steps,
        projection=cast(Projection, params.rule),
        temperature=params.temperature,
        top_p=params.top_p,
        banned_ids=torch.tensor(forbidden_ids, dtype=torch.long, device=model.device),
        control=options.get("control"),
        control_weight=options.get("control_weight", 0.0),
        seed=options.get("seed", 0),
        on_step=options.get("on_step"),
    )
    return _texts(model, denoised, len(prompt), length)


def _sample_canvas(
    model: TextModel,
    params: ResolvedSampling,
    prompt: list[int],
    length: int,
    suffix_ids: list[int],
    adjust: Adjust | None,
    options: SamplingOptions,
) -> GeneratedTexts:
    """Sample all positions of the texts at once."""
    rule = model.rule(params)
    on_step, on_text = options.get("on_step"), options.get("on_text")
    if on_text is not None:
        on_step = ProgressTracker(len(prompt), length).with_step(on_step, on_text, rule.remasks)
    denoised = sample(
        model.denoiser,
        _canvas(model, params, prompt, length, suffix_ids),
        rule,
        Visibility(model.pattern),
        num_steps=params.steps,
        grid=params.grid,
        temperature=params.temperature,
        top_p=params.top_p,
        noise=params.noise,
        adjust=adjust,
        seed=options.get("seed", 0),
        on_step=on_step,
    )
    return _texts(model, denoised, len(prompt), length)


def _sample_blocks(
    model: TextModel,
    params: ResolvedSampling,
    block_tokens: int,
    prompt: list[int],
    length: int,
    adjust: Adjust | None,
    options: SamplingOptions,
) -> GeneratedTexts:
    """Sample the texts block by block over a cache."""
    rule = model.rule(params)
    assert isinstance(rule, SelectionRule), "`resolve_sampling` refuses other rules"
    requests = [_request(model, prompt, length, number, params, options) for number in range(params.num_samples)]
    on_text, tracker = options.get("on_text"), ProgressTracker(len(prompt), length)

    def on_tick(sampler: BlockSampler) -> None:
        if on_text is not None:
            on_text(tracker.of_blocks(sampler, requests[0]))

    batch = generate_blocks(
        model.denoiser,
        requests,
        rule,
        block_tokens=block_tokens,
        context_tokens=model.sequence_length,
        num_steps=params.steps,
        grid=params.grid,
        temperature=params.temperature,
        top_p=params.top_p,
        adjust=adjust,
        is_context_causal=is_context_causal(model.objective),
        on_step=options.get("on_step"),
        on_tick=on_tick,
    )
    calls = {"denoising": batch.num_denoising_calls, "cache": batch.num_cache_calls}
    texts = (model.decode_until_end(output.ids) for output in batch.texts)
    return GeneratedTexts(texts, calls, [output.stopped_by for output in batch.texts])


def _canvas(
    model: TextModel, params: ResolvedSampling, prompt: list[int], length: int, suffix_ids: list[int]
) -> Canvas:
    filler_id = model.tokenizer_identity.end_id
    return masked_canvas(prompt, length, suffix_ids, filler_id, params.num_samples, model.device)


def _texts(model: TextModel, denoised: CanvasOutput, start: int, length: int) -> GeneratedTexts:
    """Return the texts of a whole canvas, whose generated tokens begin at `start`."""
    texts = [model.decode_until_end(ids[start : start + length].tolist()) for ids in denoised.ids]
    return GeneratedTexts(texts, {"denoising": denoised.num_network_calls, "cache": 0}, ["length"] * len(texts))


def _request(
    model: TextModel, prompt: list[int], length: int, number: int, params: ResolvedSampling, options: SamplingOptions
) -> Request:
    """Return the request of text `number` of a batch for the block sampler."""
    reward = options.get("reward")
    return Request(
        prompt,
        length,
        number,
        options.get("seed", 0),
        Stops(
            model.tokenizer_identity.end_id if "end" in params.stop else None,
            LOWEST_ENTROPY_NATS if "entropy" in params.stop else None,
        ),
        candidates=params.candidates,
        reward=None if reward is None else lambda ids: reward(model.decode(ids[1:])),
        reward_temperature=params.reward_temperature,
    )
