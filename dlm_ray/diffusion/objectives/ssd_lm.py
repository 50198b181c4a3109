"""SSD-LM (Han et al., arXiv 2210.17432): Gaussian noise on a simplex of logits, for one block after a clean context.

Token v of the block becomes the logits w_0 = +K at v and -K elsewhere, and

    w_t = sqrt(abar_t) w_0 + sqrt(1 - abar_t) K eps,   eps ~ N(0, I),
    abar_t = f(t) / f(0),   f(t) = cos^2((t + s) / (1 + s) pi / 2)

with t in 1/T .. 1. The network sees the context's embeddings, then W_diff softmax(w_t) + W_time t for the block, and
nothing after it. The loss is plain cross-entropy on the block, which is not a bound of a likelihood and is not reported
as one. Unlike in the authors' code, each sequence of a batch has its own context length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from dlm_ray.diffusion.denoiser import Batch, CanvasKind, Denoiser, Likelihood, LossSum, NetworkFacts, score
from dlm_ray.diffusion.draws import EVALUATION_MASK, MASK, NOISE, Draw, DrawKey, generator, make_draw, times
from dlm_ray.diffusion.settings import ObjectiveSettings

_OFFSET = 1e-4  # s of the cosine schedule


def alpha_bar(t: Tensor) -> Tensor:
    """Return the share of the signal's variance that is left at t in [0, 1]: 1 at 0, 0 at 1."""

    def f(time: Tensor) -> Tensor:
        return torch.cos((time + _OFFSET) / (1 + _OFFSET) * math.pi / 2) ** 2

    return f(t) / f(torch.zeros_like(t))


class SsdLm(nn.Module):
    """Cross-entropy on one noisy block per sequence.

    Args:
        vocab_size: V.
        width: D of the network.
        block_tokens: length of the block (25).
        scale: K of the simplex (5).
        num_timesteps: T of training (5000).
        times: mode of the times, as in `draws.times`.
    """

    kind = "ssd_lm"
    canvas: CanvasKind = "simplex"
    likelihood: Likelihood = "none"
    is_causal = False
    draws_per_sequence = 1

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        block_tokens: int = 25,
        scale: float = 5.0,
        num_timesteps: int = 5000,
        times: str = "stratified",
    ):
        super().__init__()
        self.vocab_size, self.block_tokens = vocab_size, block_tokens
        self.scale, self.num_timesteps, self.times = scale, num_timesteps, times
        self.diffusion_embedding = nn.Parameter(torch.zeros(vocab_size, width))  # W_diff
        self.time_slope = nn.Parameter(torch.zeros(width))  # W_time and its bias
        self.time_offset = nn.Parameter(torch.zeros(width))

    @classmethod
    def build(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> SsdLm:
        """Return the objective for a recipe's `objective` section.

        Raises:
            ValueError: if a sequence has no room for a block and its context.
        """
        objective = cls(facts.vocab_size, facts.width, **(settings["simplex"] or {}), times=settings["times"])
        if objective.block_tokens >= facts.sequence_length - 1:
            raise ValueError(
                f"objective.simplex.block_tokens={objective.block_tokens} leaves no context in sequences of "
                f"{facts.sequence_length} tokens; make it smaller, or build the data with a larger --sequence-length"
            )
        return objective

    @classmethod
    def restore(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> SsdLm:
        """Return the same objective as `build`, whose embeddings are then loaded."""
        return cls.build(settings, facts)

    def start_from(self, embedding: Tensor) -> None:
        """Copy the network's embedding [rows >= V, D] into W_diff, which is trained separately from then on."""
        with torch.no_grad():
            self.diffusion_embedding.copy_(embedding[: self.vocab_size])

    def draw(self, key: DrawKey, x_0: np.ndarray, maskable: np.ndarray) -> Draw:
        """Return times on the grid 1/T .. 1, blocks that start anywhere after the first token, and the noise seeds."""
        keys = [(key.step, index) for index in key.indices]
        return self._draw(key.seed, MASK, keys, times(self.times, key)[:, 0], maskable)

    def evaluation_draw(
        self, seed: int, keys: Sequence[tuple[int, int]], t: np.ndarray, x_0: np.ndarray, maskable: np.ndarray
    ) -> Draw:
        """Return the same for pairs (number of the draw, sequence) at given times."""
        return self._draw(seed, EVALUATION_MASK, keys, t, maskable)

    def count(self, draw: Draw) -> int:
        """Return the number of tokens in the blocks."""
        return draw.num_scored

    def token_nll(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Return [R] nats: -log p(x_0^n | w_t, context) in the block."""
        draw, num_positions = batch.draw, batch.x_0.shape[1]
        start = draw.is_masked.int().argmax(1)  # [B]
        block = start[:, None] + torch.arange(self.block_tokens, device=start.device)  # [B, K]
        tokens = batch.x_0.gather(1, block)
        noise = torch.stack([self.noise(seed, tokens.device) for seed in draw.noise_seeds])  # [B, K, V]
        w_t = self.noised(tokens, draw.t, noise)
        embedded = denoiser.embed(batch.x_0)  # [B, L, D]
        inputs = embedded.scatter(
            1, block[..., None].expand(-1, -1, embedded.shape[2]), self.embed(w_t, draw.t).to(embedded.dtype)
        )
        after = torch.arange(num_positions, device=start.device) >= start[:, None] + self.block_tokens
        groups = (
            batch.visibility.document_ids
            if batch.visibility.document_ids is not None
            else torch.zeros_like(after, dtype=torch.int32)
        )
        # Positions after the block are hidden, as another document would be.
        visibility = replace(batch.visibility, document_ids=torch.where(after, -2, groups))
        return score(denoiser, inputs, replace(batch, visibility=visibility))

    def forward(self, denoiser: Denoiser, batch: Batch) -> LossSum:
        """Return the sum over the tokens of the blocks."""
        return LossSum((batch.draw.weight * self.token_nll(denoiser, batch)).sum())

    def simplex(self, tokens: Tensor) -> Tensor:
        """Return [..., V] for ids [...]: +K at the token, -K elsewhere."""
        corner = torch.full(
            (*tokens.shape, self.vocab_size), -self.scale, device=tokens.device, dtype=self.time_slope.dtype
        )
        return corner.scatter(-1, tokens[..., None], self.scale)

    def noised(self, tokens: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return w_t [B, K, V] for ids [B, K], times [B] and standard normal noise [B, K, V]."""
        signal = alpha_bar(t)[:, None, None]
        return signal.sqrt() * self.simplex(tokens) + (1 - signal).clamp(min=0).sqrt() * self.scale * noise

    def embed(self, w: Tensor, t: Tensor) -> Tensor:
        """Return W_diff softmax(w) + W_time t [B, K, D] for logits [B, K, V] and times [B]."""
        return w.softmax(-1) @ self.diffusion_embedding + self.time_slope * t[:, None, None] + self.time_offset

    def noise(self, seed: int, device: torch.device) -> Tensor:
        """Return [K, V] standard normal numbers of one sequence, made on the device: they are too many for the host."""
        generator_ = torch.Generator(device).manual_seed(seed)
        return torch.randn(
            self.block_tokens, self.vocab_size, generator=generator_, device=device, dtype=self.time_slope.dtype
        )

    def _draw(
        self, seed: int, stream: int, keys: Sequence[tuple[int, int]], t: np.ndarray, maskable: np.ndarray
    ) -> Draw:
        num_positions = maskable.shape[1]
        assert self.block_tokens < num_positions, "a block is shorter than the sequence"
        starts = np.array(
            [
                generator(seed, stream, step, index).integers(1, num_positions - self.block_tokens + 1)
                for step, index in keys
            ]
        )
        place = np.arange(num_positions)
        is_block = (place >= starts[:, None]) & (place < starts[:, None] + self.block_tokens)
        scored = np.flatnonzero(is_block & maskable)
        t = np.minimum(np.floor(t * self.num_timesteps) + 1, self.num_timesteps) / self.num_timesteps
        seeds = [
            int(generator(seed, NOISE, step, index).integers(2**62)) + (stream == EVALUATION_MASK)
            for step, index in keys
        ]
        return replace(make_draw(t, is_block, scored, np.ones(len(scored)), maskable), noise_seeds=tuple(seeds))
