"""Masked diffusion: MD4 (arXiv 2406.04329, Eq. 5), equal to MDLM's loss and DiffuLLaMA's Eq. 7; continuous or T times.

L(x_0) = E_{t ~ U(0,1), x_t ~ q(.|x_0)} [ -alpha'_t / (1 - alpha_t) * sum_{n: x_t^n masked} -log p(x_0^n | x_t) ]

in nats per sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from torch import Tensor, nn

from dlm_ray.diffusion.absorbing import Absorbing, Process, build_process
from dlm_ray.diffusion.denoiser import (
    Batch,
    CanvasKind,
    Denoiser,
    Likelihood,
    LossSum,
    NetworkFacts,
    cross_entropy,
    nll_of,
    reduce_scored,
    scored_rows,
)
from dlm_ray.diffusion.draws import Draw, DrawKey
from dlm_ray.diffusion.objectives.auxiliary import AuxiliaryLosses
from dlm_ray.diffusion.settings import ObjectiveSettings


class LossOptions(TypedDict, total=False):
    """Arguments of `Masked` that its subclasses share, in addition to the process."""

    normalize_by: str
    draws_per_sequence: int
    auxiliary: AuxiliaryLosses


class Masked(nn.Module):
    """The negative ELBO of masked diffusion, per token or per masked token of the global batch.

    A subclass is a complete custom objective: it is built, restored, sampled and scored as this class is, and its own
    parameters are trained, averaged, saved and restored. A subclass with more constructor arguments overrides `build`.

    Args:
        process: the forward process q(x_t | x_0) with its schedule, times and weights.
        normalize_by: divisor of the loss, `all_tokens` or `global_masked`.
        draws_per_sequence: masks of one sequence in a batch.
        auxiliary: auxiliary losses; none by default.
    """

    kind = "masked"
    canvas: CanvasKind = "whole"
    likelihood: Likelihood = "bound"
    is_causal = False

    def __init__(
        self,
        process: Process | None = None,
        normalize_by: str = "all_tokens",
        draws_per_sequence: int = 1,
        auxiliary: AuxiliaryLosses | None = None,
    ):
        super().__init__()
        self.process: Process = process or Absorbing()
        self.normalize_by = normalize_by
        self.draws_per_sequence = draws_per_sequence
        self.auxiliary = auxiliary or AuxiliaryLosses()

    @classmethod
    def build(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> Masked:
        """Return the objective for a recipe's `objective` section."""
        return cls(build_process(settings, facts), **loss_options(settings))

    @classmethod
    def restore(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> Masked:
        """Return the objective that scores and samples; its process evaluates the bound over the full range of t."""
        return cls.build(settings, facts)

    def draw(self, key: DrawKey, x_0: np.ndarray, maskable: np.ndarray) -> Draw:
        """Return the draw of the process.

        In continuous time it has t in strata, masks by Bernoulli(1 - alpha(t)) and weights -alpha'/(1 - alpha).
        """
        return self.process.draw(key, maskable)

    def evaluation_draw(
        self, seed: int, keys: Sequence[tuple[int, int]], t: np.ndarray, x_0: np.ndarray, maskable: np.ndarray
    ) -> Draw:
        """Return the masks of pairs (number of the draw, sequence) at given times t [B]."""
        return self.process.evaluation_draw(seed, keys, t, maskable)

    def count(self, draw: Draw) -> int:
        """Return the number of tokens, or of masked tokens if `normalize_by` is `global_masked`."""
        return draw.num_maskable if self.normalize_by == "all_tokens" else draw.num_scored

    def token_nll(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Return [R] nats: -log p(x_0^n | x_t) at the masked positions n."""
        return nll_of(denoiser, self.rows(denoiser, batch), batch)

    def rows(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Return [R, D]: the hidden states that predict the masked positions, after one network call on x_t."""
        return scored_rows(
            denoiser, denoiser.hidden(self.process.inputs(denoiser, batch), batch.visibility), batch.draw
        )

    def rows_and_context(self, denoiser: Denoiser, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return `rows`, and the hidden states [B, L, D] of x_0 under causal attention if the pass computes them."""
        return self.rows(denoiser, batch), None

    def training_nats(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Return [R] nats: the contributions of the scored positions to the estimate of the bound, weights included."""
        return batch.draw.weight * self.token_nll(denoiser, batch)

    def forward(self, denoiser: Denoiser, batch: Batch) -> LossSum:
        """Return the weighted sum over masked tokens; the unweighted sum is logged, to compare weights and papers."""
        if self.auxiliary.any:
            return self._with_auxiliary_losses(denoiser, batch)
        nll = nll_of(denoiser, self.rows(denoiser, batch), batch)
        return LossSum((batch.draw.weight * nll).sum(), {"masked_nll": self._masked_nll(nll, batch)})

    def _with_auxiliary_losses(self, denoiser: Denoiser, batch: Batch) -> LossSum:
        """Return the sum with the auxiliary losses.

        Sums over masked tokens are divided as the loss is, all other losses by the number of tokens.
        """
        states: tuple[Tensor, ...] = ()
        if self.auxiliary.alignment_weight:
            states = denoiser.states(self.process.inputs(denoiser, batch), batch.visibility)
        clean: Tensor | None = None
        if states:
            rows = scored_rows(denoiser, states[-1], batch.draw)
        else:
            rows, clean = self.rows_and_context(denoiser, batch)
        by_token, confidence = {}, rows.new_zeros(())
        if self.auxiliary.confidence_weight:
            nll, entropy = reduce_scored(denoiser, rows, self.auxiliary.confidence, batch)
            confidence = self.auxiliary.confidence_weight * (entropy * batch.draw.is_scored).sum()
            by_token["confidence"] = confidence.detach()
        else:
            nll = reduce_scored(denoiser, rows, cross_entropy, batch)
        weighted = (batch.draw.weight * nll).sum()
        by_token["bound"] = weighted.detach()
        over_tokens = self.auxiliary.over_tokens(denoiser, batch, states, clean)
        return LossSum(weighted + confidence, {"masked_nll": self._masked_nll(nll, batch)}, by_token, over_tokens)

    def _masked_nll(self, nll: Tensor, batch: Batch) -> Tensor:
        return (nll.detach() * batch.draw.is_scored).sum()


def loss_options(settings: ObjectiveSettings) -> LossOptions:
    """Return the constructor arguments that `Masked` and its subclasses share, in addition to the process."""
    weights = (settings["confidence_weight"], settings["autoregressive_weight"], settings["alignment_weight"])
    return {
        "normalize_by": settings["normalize_by"],
        "draws_per_sequence": settings["draws_per_sequence"],
        "auxiliary": AuxiliaryLosses(*weights),
    }
