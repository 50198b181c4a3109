"""Masked diffusion in continuous time: MD4 (arXiv 2406.04329, Eq. 5), which is MDLM's loss and DiffuLLaMA's Eq. 7.

L(x_0) = E_{t ~ U(0,1), x_t ~ q(.|x_0)} [ -alpha'_t / (1 - alpha_t) * sum_{n: x_t^n masked} -log p(x_0^n | x_t) ]   in nats a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dlm_ray.diffusion.denoiser import Batch, Denoiser, LossSum, score
from dlm_ray.diffusion.draws import EVALUATION_MASK, MASK, Draw, DrawKey, mask_draw, stratified_times
from dlm_ray.diffusion.schedules import Schedule


class Masked(nn.Module):
    """The negative ELBO of masked diffusion, divided by all tokens (the bound per token) or by the masked ones of the global batch."""

    is_causal = False

    def __init__(self, schedule: Schedule, normalize_by: str = "all_tokens"):
        super().__init__()
        self.schedule = schedule
        self.normalize_by = normalize_by

    def draw(self, key: DrawKey, maskable: np.ndarray) -> Draw:
        """T in strata over the global batch, masks by Bernoulli(1 - alpha(t)), weights -alpha'/(1 - alpha)."""
        return mask_draw(key.seed, MASK, [(key.step, row) for row in key.rows], stratified_times(key), maskable, self.schedule)

    def evaluation_draw(self, seed: int, keys: Sequence[tuple[int, int]], t: np.ndarray, maskable: np.ndarray) -> Draw:
        """The masks of pairs (number of the draw, row) at given times t [B]."""
        return mask_draw(seed, EVALUATION_MASK, keys, t, maskable, self.schedule)

    def count(self, draw: Draw) -> int:
        """Tokens of the rows, or masked tokens, as `normalize_by` says."""
        return draw.num_maskable if self.normalize_by == "all_tokens" else draw.num_scored

    def token_nll(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """[R] nats: -log p(x_0^n | x_t) at the masked positions n."""
        assert denoiser.mask_id is not None, "masked diffusion needs a network with a mask token"
        x_t = torch.where(batch.draw.is_masked, denoiser.mask_id, batch.x_0)  # [B, L]
        return score(denoiser, x_t, batch)

    def forward(self, denoiser: Denoiser, batch: Batch) -> LossSum:
        """The weighted sum over masked tokens, and the unweighted one to log (comparable between weights and papers)."""
        nll = self.token_nll(denoiser, batch)
        unweighted = (nll.detach() * (batch.draw.weight > 0)).sum()
        return LossSum((batch.draw.weight * nll).sum(), {"masked_nll": unweighted})
