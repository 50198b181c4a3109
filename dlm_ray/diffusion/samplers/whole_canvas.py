"""Denoises a whole canvas at once: every step is one network call over all rows and all positions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dlm_ray.diffusion.denoiser import Denoiser
from dlm_ray.diffusion.draws import GUMBEL, SAMPLING, generator
from dlm_ray.diffusion.samplers.adjust import Adjust
from dlm_ray.diffusion.samplers.rules import Canvas, Reveal, Rule
from dlm_ray.diffusion.samplers.token_sampling import (
    Ranking,
    confidence_in,
    log_probability,
    nothing_allowed,
    probabilities,
    sample_or_stay,
    sample_tokens,
)
from dlm_ray.diffusion.visibility import Visibility

Noise = Literal["float64", "float32_gumbel"]


@dataclass(frozen=True)
class CanvasOutput:
    """A finished canvas and its number of network calls."""

    ids: Tensor
    """[B, L] int64, without masked positions."""
    num_network_calls: int
    """Network calls on the whole batch (NFE); steps that reveal nothing make no call."""


@lru_cache(maxsize=64)
def grid_times(grid: str, num_steps: int) -> tuple[float, ...]:
    """Return T + 1 times from 1 to 0: `uniform` t = i/T, or `cosine` t = cos(pi/2 (1 - i/T)) (MD4, section 4).

    The cosine grid reveals few tokens in early steps.
    """
    steps = tuple(i / num_steps for i in range(num_steps, -1, -1))
    if grid == "uniform":
        return steps
    assert grid == "cosine", f"unknown grid {grid!r}"
    return (1.0, *(math.sin(math.pi / 2 * step) for step in steps[1:-1]), 0.0)


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
    adjust: Adjust | None = None,
    noise: Noise = "float64",
    seed: int = 0,
    on_step: Callable[[int, int, Canvas], None] | None = None,
) -> CanvasOutput:
    """Reveal every masked position of `canvas`.

    Takes `num_steps` steps from t = 1 to 0, or as many as an untimed rule needs.

    The random numbers of a row depend only on (seed, row, step), never on other rows.

    Args:
        denoiser: the network.
        canvas: ids with the masked positions marked.
        rule: selects what a step reveals.
        visibility: which positions attend to which.
        num_steps: T; rules without times ignore it.
        grid: spacing of the times, `uniform` or `cosine`.
        temperature, top_p: as in `token_sampling.sample_tokens`.
        adjust: changes the logits before tokens are sampled; its rows are those of the canvas.
        noise: `float32_gumbel` samples as MD4's code does, to compare with its published results.
        seed: seed of the random numbers.
        on_step: called after each step with (steps done, steps, canvas); for an untimed rule, both count
            tokens of the slowest row.

    Raises:
        ValueError: if `adjust` allows no token at a position, or the network's logits are not finite.
    """
    shape = canvas.ids.shape
    num_calls = 0
    times = grid_times(grid, num_steps)
    num_open = int(canvas.is_open.sum(1).max())
    for step in itertools.count():
        is_over = step == num_steps if rule.is_timed else step > num_open
        if is_over or not (rule.remasks or bool(canvas.is_masked.any())):
            break
        t, s = (times[step], times[step + 1]) if rule.is_timed else (1.0, 0.0)
        uniform = _uniform(seed, step, shape, canvas.ids.device)  # [2, B, L]
        proposals = Proposals(
            denoiser, canvas, visibility, uniform[0].flatten(), temperature, top_p, adjust, noise, (seed, step)
        )
        canvas = rule.step(canvas, proposals, t, s, uniform[1])
        num_calls += proposals.num_calls
        if on_step is not None:
            done = (step + 1, num_steps) if rule.is_timed else (num_open - int(canvas.is_masked.sum(1).max()), num_open)
            on_step(*done, canvas)
    assert not bool(canvas.is_masked.any()), "a rule reveals every position by time 0"
    return CanvasOutput(canvas.ids, num_calls)


@dataclass
class Proposals:
    """The network's proposals for one canvas (implements `rules.Propose`)."""

    denoiser: Denoiser
    canvas: Canvas
    visibility: Visibility
    uniform: Tensor
    """[B * L] float64, one random number per position."""
    temperature: float
    top_p: float
    adjust: Adjust | None
    noise: Noise
    key: tuple[int, int]
    """(seed, step) of the Gumbel noise."""
    num_calls: int = 0
    hidden: Tensor | None = None
    """[B, L, D] hidden states of an earlier call, which may be shared with other canvases; None makes a call."""
    last_log_p: tuple[Tensor, Tensor] | None = None
    """Positions [N] and log-probabilities [N] of the tokens proposed last; set if `stream_canvas`."""
    stream_canvas: bool = False
    """Whether to compute the log-probability of every proposed token, for display."""

    def __call__(self, positions: Tensor, confidence: Ranking | None = "probability") -> tuple[Tensor, Tensor]:
        """Return tokens and the model's confidence in them."""

        def sample_rows(logits: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            logits = self._adjusted(logits, positions)
            if self._is_gumbel:
                probs = probabilities(logits, self.temperature, self.top_p)
                tokens = (probs.float().log() + self._gumbel(positions, probs.shape[1])).argmax(-1)
                tokens = tokens.masked_fill(probs[:, 0].isnan(), -1)
                ranked = confidence_in(tokens, probabilities(logits, 1.0, 1.0), confidence or "probability")
            else:
                tokens, ranked = sample_tokens(
                    logits, self.uniform[positions], self.temperature, self.top_p, confidence
                )
            return self._with_log_probability(tokens, ranked, logits)

        return self._reduce(positions, sample_rows)

    def transition(self, positions: Tensor, reveal: Reveal) -> tuple[Tensor, Tensor]:
        """Return tokens, and whether each position was revealed."""

        def sample_rows(logits: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            adjusted = self._adjusted(logits, positions)
            probs = probabilities(adjusted, self.temperature, self.top_p)
            becomes = reveal(probs, logits.double())  # [n, V]
            if self._is_gumbel:
                stays = (1 - becomes.sum(-1, keepdim=True)).clamp(min=0)
                outcomes = torch.cat([becomes, stays], 1).float().log()
                outcome = (outcomes + self._gumbel(positions, outcomes.shape[1])).argmax(-1)
                is_impossible = probs[:, 0].isnan()
                tokens = outcome.clamp(max=becomes.shape[1] - 1).masked_fill(is_impossible, -1)
                is_revealed = (outcome < becomes.shape[1]) | is_impossible
            else:
                tokens, is_revealed = sample_or_stay(becomes, self.uniform[positions])
            return self._with_log_probability(tokens, is_revealed, adjusted)

        return self._reduce(positions, sample_rows)

    def _with_log_probability(self, tokens: Tensor, other: Tensor, logits: Tensor) -> tuple[Tensor, ...]:
        return (tokens, other, log_probability(tokens, logits)) if self.stream_canvas else (tokens, other)

    @property
    def _is_gumbel(self) -> bool:
        return self.noise == "float32_gumbel" and self.temperature > 0

    def _adjusted(self, logits: Tensor, positions: Tensor) -> Tensor:
        num_positions = self.canvas.ids.shape[1]
        return (
            logits
            if self.adjust is None
            else self.adjust(logits, positions // num_positions, positions % num_positions)
        )

    def _reduce(self, positions: Tensor, sample_rows: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
        self.num_calls += 1
        canvas, mask_id, hidden = self.canvas, self.denoiser.mask_id, self.hidden
        if hidden is None:
            x_t = canvas.ids if mask_id is None else torch.where(canvas.is_masked, mask_id, canvas.ids)
            hidden = self.denoiser.hidden(x_t, self.visibility)
        rows = hidden.flatten(0, 1)[self.denoiser.rows_for(positions)]
        tokens, other, *log_p = self.denoiser.reduce_logits(rows, sample_rows, positions)
        if bool((tokens < 0).any()):
            raise ValueError(
                nothing_allowed(None if self.adjust is None else int(positions[tokens < 0][0]) % canvas.ids.shape[1])
            )
        if log_p:
            self.last_log_p = positions, log_p[0]
        return tokens, other

    def _gumbel(self, positions: Tensor, num_outcomes: int) -> Tensor:
        """Return Gumbel noise [n, outcomes] float32, generated for every position separately."""
        seed, step = self.key
        uniform = [
            generator(seed, GUMBEL, step, position).random(num_outcomes, dtype=np.float32)
            for position in positions.tolist()
        ]
        numbers = torch.from_numpy(np.stack(uniform)).clamp(min=torch.finfo(torch.float32).tiny)
        return (-torch.log(-torch.log(numbers))).to(positions.device)


def _uniform(seed: int, step: int, shape: torch.Size, device: torch.device) -> Tensor:
    """Return random numbers [2, B, L] float64 in [0, 1) of a step, for tokens and for positions, by row."""
    rows = [generator(seed, SAMPLING, step, row).random((2, shape[1])) for row in range(shape[0])]
    return torch.from_numpy(np.stack(rows, axis=1)).to(device)
