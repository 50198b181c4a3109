"""Denoising a whole canvas at once: every step is one network call over all rows, whatever is already revealed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dlm_ray.diffusion.denoiser import Denoiser
from dlm_ray.diffusion.draws import GUMBEL, SAMPLING, generator
from dlm_ray.diffusion.samplers.rules import Canvas, Reveal, Rule
from dlm_ray.diffusion.visibility import Visibility

Noise = Literal["float64", "float32_gumbel"]


@dataclass(frozen=True)
class Sampled:
    """A finished canvas, and what it cost."""

    ids: Tensor
    """[B, L] int64, nothing masked."""
    num_network_calls: int
    """Calls of the network on the whole batch (NFE); steps that revealed nothing cost none."""


def grid_times(grid: str, num_steps: int) -> list[float]:
    """T + 1 times from 1 to 0: `uniform` t = i/T, or `cosine` t = cos(pi/2 (1 - i/T)) (MD4, section 4), which reveals little at first."""
    steps = [i / num_steps for i in range(num_steps, -1, -1)]
    if grid == "uniform":
        return steps
    assert grid == "cosine", f"unknown grid {grid!r}"
    return [1.0, *(math.sin(math.pi / 2 * step) for step in steps[1:-1]), 0.0]


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    canvas: Canvas,
    rule: Rule,
    visibility: Visibility,
    *,
    num_steps: int,
    grid: str = "uniform",
    temperature: float = 1.0,
    top_p: float = 1.0,
    banned_ids: Tensor | None = None,
    noise: Noise = "float64",
    seed: int = 0,
    on_step: Callable[[int, int, Canvas], None] | None = None,
) -> Sampled:
    """Reveals every masked position of `canvas` in `num_steps` steps from t = 1 to 0.

    Tokens are drawn by inverting the cumulative distribution in float64 with one uniform number a token. That is the law of
    float64 Gumbel-max, without the truncated tails that float32 Gumbel noise gives (which lower the entropy and flatter the
    text), and a row's numbers depend on (seed, row, step) alone, never on its neighbours.

    Args:
        denoiser: the network.
        canvas: ids with the masked positions marked.
        rule: what a step reveals.
        visibility: who sees whom.
        num_steps: T.
        grid: `uniform` or `cosine` times.
        temperature: divides the logits; 0 takes the most probable token.
        top_p: keeps the smallest set of tokens with at least this probability (nucleus).
        banned_ids: tokens that are never drawn.
        noise: `float32_gumbel` draws as MD4's code does, to compare with what it published.
        seed: of the randomness.
        on_step: called after each step with (steps done, steps, canvas).
    """
    shape = canvas.ids.shape
    num_calls = 0
    times = grid_times(grid, num_steps)
    for step in range(num_steps):
        if not bool(canvas.is_masked.any()):
            break
        uniform = _uniform(seed, step, shape, canvas.ids.device)  # [2, B, L]
        proposals = _Proposals(denoiser, canvas, visibility, uniform[0].flatten(), temperature, top_p, banned_ids, noise, (seed, step))
        canvas = rule.step(canvas, proposals, times[step], times[step + 1], uniform[1])
        num_calls += proposals.num_calls
        if on_step is not None:
            on_step(step + 1, num_steps, canvas)
    assert not bool(canvas.is_masked.any()), "a rule reveals every position by time 0"
    return Sampled(canvas.ids, num_calls)


@dataclass
class _Proposals:
    """What the network says of one canvas (`rules.Propose`)."""

    denoiser: Denoiser
    canvas: Canvas
    visibility: Visibility
    uniform: Tensor
    """[B * L] float64, a number for every token."""
    temperature: float
    top_p: float
    banned_ids: Tensor | None
    noise: Noise
    key: tuple[int, int]
    """(seed, step) of Gumbel noise."""
    num_calls: int = 0

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their log-probabilities."""
        if self._is_gumbel:
            return self._reduce(positions, self._gumbel_token, positions)

        def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
            return draw_tokens(logits, uniform, self.temperature, self.top_p, self.banned_ids)

        return self._reduce(positions, draw, self.uniform[positions])

    def transition(self, positions: Tensor, reveal: Reveal) -> tuple[Tensor, Tensor]:
        """Tokens, and whether each position was revealed."""

        def draw(logits: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            becomes = reveal(probabilities(logits, self.temperature, self.top_p, self.banned_ids), logits.double())  # [n, V]
            if not self._is_gumbel:
                return draw_or_stay(becomes, self.uniform[positions])
            stays = (1 - becomes.sum(-1, keepdim=True)).clamp(min=0)
            outcomes = torch.cat([becomes, stays], 1).float().log()
            chosen = (outcomes + self._gumbel(positions, outcomes.shape[1])).argmax(-1)
            return chosen.clamp(max=becomes.shape[1] - 1), chosen < becomes.shape[1]

        return self._reduce(positions, draw, positions)

    @property
    def _is_gumbel(self) -> bool:
        return self.noise == "float32_gumbel" and self.temperature > 0

    def _reduce(self, positions: Tensor, draw: Callable[..., tuple[Tensor, Tensor]], argument: Tensor) -> tuple[Tensor, Tensor]:
        self.num_calls += 1
        canvas, mask_id = self.canvas, self.denoiser.mask_id
        x_t = canvas.ids if mask_id is None else torch.where(canvas.is_masked, mask_id, canvas.ids)
        rows = self.denoiser.hidden(x_t, self.visibility).flatten(0, 1)[self.denoiser.rows_for(positions)]
        return self.denoiser.reduce_logits(rows, draw, argument)

    def _gumbel_token(self, logits: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        probs = probabilities(logits, self.temperature, self.top_p, self.banned_ids)
        tokens = (probs.float().log() + self._gumbel(positions, probs.shape[1])).argmax(-1)
        return tokens, probabilities(logits, 1.0, 1.0, self.banned_ids).log().gather(1, tokens[:, None])[:, 0]

    def _gumbel(self, positions: Tensor, num_outcomes: int) -> Tensor:
        """[n, outcomes] float32 Gumbel numbers, of every position its own."""
        seed, step = self.key
        uniform = [generator(seed, GUMBEL, step, position).random(num_outcomes, dtype=np.float32) for position in positions.tolist()]
        numbers = torch.from_numpy(np.stack(uniform)).clamp(min=torch.finfo(torch.float32).tiny)
        return (-torch.log(-torch.log(numbers))).to(positions.device)


def probabilities(logits: Tensor, temperature: float, top_p: float, banned_ids: Tensor | None) -> Tensor:
    """[n, V] logits -> [n, V] float64 probabilities at this temperature within the nucleus, of a sum of 1; 0 for banned tokens."""
    logits = logits.double()
    if banned_ids is not None:
        logits = logits.index_fill(1, banned_ids, float("-inf"))
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[1]).double()
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        probs = nucleus(probs, top_p)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw_or_stay(becomes: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """[n, V] probabilities of a sum of at most 1, [n] uniform numbers -> tokens [n], and whether one was drawn [n] (else: stays masked)."""
    cumulative = becomes.cumsum(-1)
    total = cumulative[:, -1]
    # Rounding may leave a sum of 1 below it; then nothing stays.
    target = torch.where(total > 1 - 1e-9, uniform * total, uniform)
    tokens = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return tokens.clamp(max=becomes.shape[1] - 1), tokens < becomes.shape[1]


def draw_tokens(logits: Tensor, uniform: Tensor, temperature: float, top_p: float, banned_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token a row of logits.

    Args:
        logits: [n, V].
        uniform: [n] float64 in [0, 1).
        temperature, top_p, banned_ids: as in `sample`.

    Returns:
        tokens [n] int64, and their log-probabilities [n] float64 under the model at temperature 1 (the confidence).
    """
    log_probs = probabilities(logits, 1.0, 1.0, banned_ids).log()
    tokens = draw_or_stay(probabilities(logits, temperature, top_p, banned_ids), uniform)[0]
    return tokens, log_probs.gather(1, tokens[:, None])[:, 0]


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """[n, V] -> the smallest set of largest probabilities that reaches top_p, the rest 0 (not normalised)."""
    ordered, order = probs.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered  # the mass of the tokens in front; the first token is always kept
    return torch.zeros_like(probs).scatter(-1, order, torch.where(before < top_p, ordered, 0.0))


def _uniform(seed: int, step: int, shape: torch.Size, device: torch.device) -> Tensor:
    """[2, B, L] float64 in [0, 1): each row's own numbers of this step, for tokens and for positions."""
    rows = [generator(seed, SAMPLING, step, row).random((2, shape[1])) for row in range(shape[0])]
    return torch.from_numpy(np.stack(rows, axis=1)).to(device)
