"""Masked diffusion: MD4 (arXiv 2406.04329, Eq. 5), which is MDLM's loss and DiffuLLaMA's Eq. 7; in continuous time or at T times.

L(x_0) = E_{t ~ U(0,1), x_t ~ q(.|x_0)} [ -alpha'_t / (1 - alpha_t) * sum_{n: x_t^n masked} -log p(x_0^n | x_t) ]   in nats a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from dlm_ray.diffusion.absorbing import Absorbing, Process
from dlm_ray.diffusion.denoiser import Batch, Denoiser, LossSum, cross_entropy, nll_of, reduce_scored, scored_rows
from dlm_ray.diffusion.draws import Draw, DrawKey
from dlm_ray.diffusion.objectives.auxiliary import AuxiliaryLosses


class Masked(nn.Module):
    """The negative ELBO of masked diffusion, divided by all tokens (the bound per token) or by the masked ones of the global batch.

    Args:
        process: the forward process q(x_t | x_0) with its schedule, times and weights.
        normalize_by: `all_tokens` or `global_masked`.
        draws_per_sequence: masks of one row in a batch.
        terms: what today's systems add to the loss; nothing by default.
    """

    is_causal = False
    likelihood = "bound"

    def __init__(
        self,
        process: Process | None = None,
        normalize_by: str = "all_tokens",
        draws_per_sequence: int = 1,
        terms: AuxiliaryLosses | None = None,
    ):
        super().__init__()
        self.process = process or Absorbing()
        self.normalize_by = normalize_by
        self.draws_per_sequence = draws_per_sequence
        self.terms = terms or AuxiliaryLosses()

    def draw(self, key: DrawKey, x_0: np.ndarray, maskable: np.ndarray) -> Draw:
        """The process's; with the continuous one t in strata, masks by Bernoulli(1 - alpha(t)), weights -alpha'/(1 - alpha)."""
        return self.process.draw(key, maskable)

    def evaluation_draw(
        self, seed: int, keys: Sequence[tuple[int, int]], t: np.ndarray, x_0: np.ndarray, maskable: np.ndarray
    ) -> Draw:
        """The masks of pairs (number of the draw, row) at given times t [B]."""
        return self.process.evaluation_draw(seed, keys, t, maskable)

    def count(self, draw: Draw) -> int:
        """Tokens of the rows, or masked tokens, as `normalize_by` says."""
        return draw.num_maskable if self.normalize_by == "all_tokens" else draw.num_scored

    def token_nll(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """[R] nats: -log p(x_0^n | x_t) at the masked positions n."""
        return nll_of(denoiser, self.rows(denoiser, batch), batch)

    def rows(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """[R, D]: the hidden rows that predict the masked positions, after one network call on x_t."""
        return scored_rows(
            denoiser, denoiser.hidden(self.process.inputs(denoiser, batch), batch.visibility), batch.draw
        )

    def training_nats(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """[R] nats: what the scored positions of a training draw add to the estimate of the bound, weights included."""
        return batch.draw.weight * self.token_nll(denoiser, batch)

    def forward(self, denoiser: Denoiser, batch: Batch) -> LossSum:
        """The weighted sum over masked tokens, and the unweighted one to log (comparable between weights and papers)."""
        if self.terms.any:
            return self._with_terms(denoiser, batch)
        nll = nll_of(denoiser, self.rows(denoiser, batch), batch)
        return LossSum((batch.draw.weight * nll).sum(), {"masked_nll": self._masked_nll(nll, batch)})

    def _with_terms(self, denoiser: Denoiser, batch: Batch) -> LossSum:
        """The same with the terms: what is a sum over masked tokens is divided as the loss is, all others by the number of tokens."""
        states: tuple[Tensor, ...] = ()
        if self.terms.alignment_weight:
            states = denoiser.states(self.process.inputs(denoiser, batch), batch.visibility)
        rows = scored_rows(denoiser, states[-1], batch.draw) if states else self.rows(denoiser, batch)
        by_token, confidence = {}, rows.new_zeros(())
        if self.terms.confidence_weight:
            nll, entropy = reduce_scored(denoiser, rows, self.terms.confidence, batch)
            confidence = self.terms.confidence_weight * (entropy * batch.draw.is_scored).sum()
            by_token["confidence"] = confidence.detach()
        else:
            nll = reduce_scored(denoiser, rows, cross_entropy, batch)
        weighted = (batch.draw.weight * nll).sum()
        by_token["bound"] = weighted.detach()
        over_tokens = self.terms.over_tokens(denoiser, batch, states)
        return LossSum(weighted + confidence, {"masked_nll": self._masked_nll(nll, batch)}, by_token, over_tokens)

    def _masked_nll(self, nll: Tensor, batch: Batch) -> Tensor:
        return (nll.detach() * batch.draw.is_scored).sum()
