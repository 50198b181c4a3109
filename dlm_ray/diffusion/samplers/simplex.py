"""SSD-LM's decoding (section 3.3): block after block, each from Gaussian noise on a simplex, optionally with guidance.

A block starts from w_1 ~ K N(0, I). For t = 1, 1 - 1/T, .. 1/T, the sampler computes logits, moves them along the
gradient of a classifier if there is one, projects them to a corner of the simplex, and adds noise for t - 1/T. Finished
blocks are the context of later ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dlm_ray.diffusion.denoiser import Denoiser
from dlm_ray.diffusion.draws import SAMPLING, generator
from dlm_ray.diffusion.objectives.ssd_lm import SsdLm, alpha_bar
from dlm_ray.diffusion.samplers.rules import Canvas
from dlm_ray.diffusion.samplers.token_sampling import nothing_allowed, nucleus, probabilities, sample_tokens
from dlm_ray.diffusion.samplers.whole_canvas import CanvasOutput
from dlm_ray.diffusion.visibility import Visibility

Projection = Literal["greedy", "sampled", "multi_hot"]
Control = Callable[[Tensor], Tensor]
"""[B, K, V] probabilities -> [B] log f(y | text): a classifier of mixtures of embeddings that guides sampling."""


@torch.no_grad()
def sample_blocks(
    denoiser: Denoiser,
    objective: SsdLm,
    canvas: Canvas,
    *,
    num_steps: int,
    projection: Projection = "sampled",
    temperature: float = 1.0,
    top_p: float = 1.0,
    banned_ids: Tensor | None = None,
    control: Control | None = None,
    control_weight: float = 0.0,
    seed: int = 0,
    on_step: Callable[[int, int, Canvas], None] | None = None,
) -> CanvasOutput:
    """Generate the masked tail of `canvas` in blocks of the trained length, with `num_steps` network calls each.

    Args:
        denoiser, objective: the network, and the objective of its training, which defines noise and embeddings.
        canvas: clean context, then masked positions to the end, the same number in every row.
        num_steps: T, the steps of a block; training may use more.
        projection: `greedy` takes the argmax; `sampled` takes a token from the nucleus; `multi_hot` takes all tokens of
            the nucleus at once.
        temperature, top_p: as in `token_sampling.sample_tokens`.
        banned_ids: tokens that are never sampled.
        control, control_weight: logits += weight * gradient of control(softmax(logits)).
        seed: seed of the random numbers; those of a row do not depend on other rows.
        on_step: called after each step with (steps done, steps, canvas).
    """
    num_rows, num_positions = canvas.ids.shape
    first = int((~canvas.is_masked[0]).sum())
    assert bool((canvas.is_masked == (torch.arange(num_positions, device=canvas.ids.device) >= first)).all()), (
        "the masked positions are the tail"
    )
    num_blocks = -(-(num_positions - first) // objective.block_tokens)
    device, num_calls = canvas.ids.device, 0
    visibility = Visibility("bidirectional")
    for block in range(num_blocks):
        start = first + block * objective.block_tokens
        length = min(objective.block_tokens, num_positions - start)
        # The network sees the last block at full length, as in training; tokens beyond the canvas are dropped.
        random = [generator(seed, SAMPLING, block, row) for row in range(num_rows)]
        context = denoiser.embed(canvas.ids[:, :start])
        w = objective.scale * _normal(random, objective, device)  # [B, K, V]
        tokens = canvas.ids[:, :0]
        for step in range(num_steps, 0, -1):
            t = torch.full((num_rows,), step / num_steps, device=device, dtype=w.dtype)
            inputs = torch.cat([context, objective.embed(w, t).to(context.dtype)], 1)
            hidden = denoiser.hidden(inputs, visibility)  # [B, start + K, D]
            positions = (
                torch.arange(start, start + objective.block_tokens, device=device)
                + hidden.shape[1] * torch.arange(num_rows, device=device)[:, None]
            )
            rows = hidden.flatten(0, 1)[denoiser.rows_for(positions.flatten())]
            logits = denoiser.reduce_logits(rows, lambda logits: logits).view(w.shape)
            num_calls += 1
            if control is not None:
                logits = steered(logits, control, control_weight)
            if banned_ids is not None:
                logits = logits.index_fill(2, banned_ids, float("-inf"))
            uniform = torch.stack([torch.from_numpy(each.random(objective.block_tokens)) for each in random]).to(device)
            tokens, corner = project(objective, logits, projection, uniform, temperature, top_p)
            then = alpha_bar(t - 1 / num_steps)[:, None, None].clamp(0, 1)
            w = then.sqrt() * corner
            if step > 1:
                w = w + (1 - then).sqrt() * objective.scale * _normal(random, objective, device)
            if on_step is not None:
                on_step(block * num_steps + num_steps - step + 1, num_blocks * num_steps, canvas)
        filled = (
            torch.arange(start, start + length, device=device)
            + num_positions * torch.arange(num_rows, device=device)[:, None]
        )
        canvas = canvas.revealed(filled.flatten(), tokens[:, :length].flatten())
    return CanvasOutput(canvas.ids, num_calls)


def project(
    objective: SsdLm,
    logits: Tensor,
    projection: Projection,
    uniform: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return tokens [B, K] and the corner [B, K, V] of the simplex.

    The corner is +K at the tokens that the projection takes, and -K elsewhere. `uniform` [B, K] float64 are the
    random numbers of `sampled`.
    """
    flat = logits.flatten(0, 1)
    sampled = sample_tokens(flat, uniform.flatten(), 0.0 if projection != "sampled" else temperature, top_p, None)[0]
    if bool((sampled < 0).any()):
        raise ValueError(nothing_allowed(None))
    tokens = sampled.view(logits.shape[:2])
    if projection != "multi_hot":
        return tokens, objective.simplex(tokens)
    kept = nucleus(probabilities(flat, temperature or 1.0, 1.0), top_p).view(logits.shape) > 0
    return tokens, torch.where(kept, objective.scale, -objective.scale).to(logits)


def steered(logits: Tensor, control: Control, weight: float) -> Tensor:
    """Return logits + weight * d control(softmax(logits)) / d logits, [B, K, V]."""
    with torch.enable_grad():
        free = logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(control(free.softmax(-1)).sum(), free)
    return logits + weight * gradient


def _normal(random: list[np.random.Generator], objective: SsdLm, device: torch.device) -> Tensor:
    """Return standard normal numbers [B, K, V], each row from its own generator."""
    numbers = [
        torch.from_numpy(each.standard_normal((objective.block_tokens, objective.vocab_size), dtype=np.float32))
        for each in random
    ]
    return torch.stack(numbers).to(device, objective.time_slope.dtype)
