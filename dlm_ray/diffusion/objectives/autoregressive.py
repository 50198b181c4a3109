"""The autoregressive language model, -log p(x) = sum_n -log p(x^n | x^<n): the base of adaptation and the baseline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from dlm_ray.diffusion.denoiser import Batch, CanvasKind, Denoiser, Likelihood, LossSum, NetworkFacts, score
from dlm_ray.diffusion.draws import Draw, DrawKey, make_draw
from dlm_ray.diffusion.settings import ObjectiveSettings


class Autoregressive(nn.Module):
    """Next-token cross-entropy over exactly the tokens that diffusion objectives score, so that their bits compare."""

    kind = "autoregressive"
    canvas: CanvasKind = "autoregressive"
    likelihood: Likelihood = "exact"
    is_causal = True
    draws_per_sequence = 1

    @classmethod
    def build(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> Autoregressive:
        """Return the objective; no setting changes it."""
        return cls()

    @classmethod
    def restore(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> Autoregressive:
        """Return the same objective as `build`."""
        return cls.build(settings, facts)

    def draw(self, key: DrawKey, x_0: np.ndarray, maskable: np.ndarray) -> Draw:
        """Return a draw that masks nothing and scores everything, at weight 1."""
        return exact_draw(maskable)

    def evaluation_draw(
        self, seed: int, keys: Sequence[tuple[int, int]], t: np.ndarray, x_0: np.ndarray, maskable: np.ndarray
    ) -> Draw:
        """Return the same draw as in training; it has no randomness."""
        return exact_draw(maskable)

    def count(self, draw: Draw) -> int:
        """Return the number of tokens."""
        return draw.num_maskable

    def token_nll(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Return [R] nats: -log p(x^n | x^<n)."""
        return score(denoiser, batch.x_0, batch)

    def forward(self, denoiser: Denoiser, batch: Batch) -> LossSum:
        """Return the sum over all tokens."""
        return LossSum((batch.draw.weight * self.token_nll(denoiser, batch)).sum())


def exact_draw(maskable: np.ndarray) -> Draw:
    """Return the draw without randomness: t = 0, nothing masked, every maskable position scored."""
    scored = np.flatnonzero(maskable)
    return make_draw(np.zeros(len(maskable)), np.zeros_like(maskable), scored, np.ones(len(scored)), maskable)
