"""The autoregressive language model: -log p(x) = sum_n -log p(x^n | x^<n), the base that is adapted and the baseline that is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from dlm_ray.diffusion.denoiser import Batch, Denoiser, LossSum, score
from dlm_ray.diffusion.draws import Draw, DrawKey, make_draw


class Autoregressive(nn.Module):
    """Next-token cross-entropy over exactly the tokens that the diffusion objectives score, so that their bits compare."""

    is_causal = True
    likelihood = "exact"
    draws_per_sequence = 1

    def draw(self, key: DrawKey, x_0: np.ndarray, maskable: np.ndarray) -> Draw:
        """Nothing is masked and everything is scored, at weight 1."""
        return exact_draw(maskable)

    def evaluation_draw(
        self, seed: int, keys: Sequence[tuple[int, int]], t: np.ndarray, x_0: np.ndarray, maskable: np.ndarray
    ) -> Draw:
        """The same: there is nothing to draw."""
        return exact_draw(maskable)

    def count(self, draw: Draw) -> int:
        """Every token counts."""
        return draw.num_maskable

    def token_nll(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """[R] nats: -log p(x^n | x^<n)."""
        return score(denoiser, batch.x_0, batch)

    def forward(self, denoiser: Denoiser, batch: Batch) -> LossSum:
        """The sum over all tokens."""
        return LossSum((batch.draw.weight * self.token_nll(denoiser, batch)).sum())


def exact_draw(maskable: np.ndarray) -> Draw:
    """The draw without randomness: t = 0, nothing masked, every maskable position scored."""
    scored = np.flatnonzero(maskable)
    return make_draw(np.zeros(len(maskable)), np.zeros_like(maskable), scored, np.ones(len(scored)), maskable)
