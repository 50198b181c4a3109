"""Denoising a whole canvas at once: every step is one network call over all rows, whatever is already revealed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dlm_ray.diffusion.denoiser import Denoiser
from dlm_ray.diffusion.draws import SAMPLING, generator
from dlm_ray.diffusion.samplers.rules import Canvas, Rule
from dlm_ray.diffusion.visibility import Visibility


@dataclass(frozen=True)
class Sampled:
    """A finished canvas, and what it cost."""

    ids: Tensor
    """[B, L] int64, nothing masked."""
    num_network_calls: int
    """Calls of the network on the whole batch (NFE); steps that revealed nothing cost none."""


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    canvas: Canvas,
    rule: Rule,
    visibility: Visibility,
    *,
    num_steps: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    banned_ids: Tensor | None = None,
    seed: int = 0,
    on_step: Callable[[int, int, Canvas], None] | None = None,
) -> Sampled:
    """Reveals every masked position of `canvas` in `num_steps` steps of equal length from t = 1 to 0.

    Tokens are drawn by inverting the cumulative distribution in float64 with one uniform number a token. That is the law of
    float64 Gumbel-max, without the truncated tails that float32 Gumbel noise gives (which lower the entropy and flatter the
    text), and a row's numbers depend on (seed, row, step) alone, never on its neighbours.

    Args:
        denoiser: the network.
        canvas: ids with the masked positions marked.
        rule: what a step reveals.
        visibility: who sees whom.
        num_steps: T.
        temperature: divides the logits; 0 takes the most probable token.
        top_p: keeps the smallest set of tokens with at least this probability (nucleus).
        banned_ids: tokens that are never drawn.
        seed: of the randomness.
        on_step: called after each step with (steps done, steps, canvas).
    """
    shape = canvas.ids.shape
    num_calls = 0
    for step in range(num_steps):
        if not bool(canvas.is_masked.any()):
            break
        uniform = _uniform(seed, step, shape, canvas.ids.device)  # [2, B, L]

        def propose(positions: Tensor, before: Canvas = canvas, noise: Tensor = uniform[0]) -> tuple[Tensor, Tensor]:
            nonlocal num_calls
            num_calls += 1
            x_t = before.ids if denoiser.mask_id is None else torch.where(before.is_masked, denoiser.mask_id, before.ids)
            rows = denoiser.hidden(x_t, visibility).flatten(0, 1)[denoiser.rows_for(positions)]
            return denoiser.reduce_logits(
                rows, lambda logits, u: draw_tokens(logits, u, temperature, top_p, banned_ids), noise.flatten()[positions]
            )

        canvas = rule.step(canvas, propose, 1 - step / num_steps, 1 - (step + 1) / num_steps, uniform[1])
        if on_step is not None:
            on_step(step + 1, num_steps, canvas)
    assert not bool(canvas.is_masked.any()), "a rule reveals every position by time 0"
    return Sampled(canvas.ids, num_calls)


def draw_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float, banned_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token a row of logits.

    Args:
        logits: [n, V].
        uniform: [n] float64 in [0, 1).
        temperature, top_p, banned_ids: as in `sample`.

    Returns:
        tokens [n] int64, and their log-probabilities [n] float64 under the model at temperature 1 (the confidence).
    """
    logits = logits.double()
    if banned_ids is not None:
        logits = logits.index_fill(1, banned_ids, float("-inf"))
    log_probs = logits.log_softmax(-1)
    if temperature == 0:
        tokens = log_probs.argmax(-1)
    else:
        probs = (logits / temperature).softmax(-1)  # [n, V]
        if top_p < 1:
            probs = _nucleus(probs, top_p)
        cumulative = probs.cumsum(-1)
        # Rounding may leave the last sum below 1; scaling the uniform number keeps it inside. `right` skips tokens of probability 0.
        target = (uniform.to(cumulative) * cumulative[:, -1])[:, None]
        tokens = torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    """[n, V] -> the smallest set of largest probabilities that reaches top_p, the rest 0 (not normalised)."""
    ordered, order = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # the mass of the tokens in front; the first token is always kept
    return torch.zeros_like(probs).scatter(-1, order, torch.where(before < top_p, ordered, 0.0))


def _uniform(seed: int, step: int, shape: torch.Size, device: torch.device) -> Tensor:
    """[2, B, L] float64 in [0, 1): each row's own numbers of this step, for tokens and for positions."""
    rows = [generator(seed, SAMPLING, step, row).random((2, shape[1])) for row in range(shape[0])]
    return torch.from_numpy(np.stack(rows, axis=1)).to(device)
