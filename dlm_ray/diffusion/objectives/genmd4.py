"""GenMD4 (arXiv 2406.04329, section 6): every token v has its own schedule, alpha_{t,v} = 1 - t ** w_v, with learned w.

L(x_0) = int_{t_1}^1 E_{x_t} sum_{n masked} (1/t) [ sum_v w_v mu_v - w_x (1 + log mu_x) ] dt
         + sum_n t_1^{w_x} ( logsumexp_v(w_v ln t_1) - w_x ln t_1 ),       x = x_0^n, mu = p(x_0^n | x_t)

The second line is the reconstruction at t_1: p(x_0 | x_{t_1}) is proportional to q(x_{t_1} | x_0). The masks depend on
w, so the gradient of w needs REINFORCE: two independent x_t of one (x_0, t) are each other's baseline (leave-one-out).
Unlike the authors' code, this one keeps the factor (1 - t_1) of the integral, and alpha_1 is 0, so that no prior term
is missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.denoiser import (
    Batch,
    CanvasKind,
    Denoiser,
    Likelihood,
    LossSum,
    NetworkFacts,
    reduce_scored,
    scored_rows,
)
from dlm_ray.diffusion.draws import EVALUATION_MASK, MASK, Draw, DrawKey, make_draw, times, uniforms
from dlm_ray.diffusion.settings import ObjectiveSettings

T_1 = 1e-3
# The largest float32 below 1: at t = 1 an unmasked token has probability 0.
_LATEST = 1 - 2.0**-24


class GenMD4(nn.Module):
    """MD4 with learned exponents w = softplus(theta) > 0, all 1 (the linear schedule) at the start.

    Args:
        process: gives the mode of the times and the network's input. The exponents decide the masks.
        vocab_size: V, the tokens that have an exponent.
        scalar: one exponent for all tokens, the ablation that should change nothing.
    """

    kind = "genmd4"
    canvas: CanvasKind = "whole"
    likelihood: Likelihood = "bound"
    is_causal = False
    draws_per_sequence = 2  # draws 2i and 2i+1 of a batch are two masks of one sequence at one time

    def __init__(self, process: Absorbing, vocab_size: int, scalar: bool = False):
        super().__init__()
        self.process, self.vocab_size = process, vocab_size
        self.theta = nn.Parameter(torch.full((1 if scalar else vocab_size,), math.log(math.e - 1)))

    @classmethod
    def build(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> GenMD4:
        """Return the objective for a recipe's `objective` section."""
        return cls(Absorbing(times=settings["times"]), facts.vocab_size, scalar=settings["exponents"] == "scalar")

    @classmethod
    def restore(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> GenMD4:
        """Return the same objective as `build`, whose exponents are then loaded."""
        return cls.build(settings, facts)

    @property
    def exponents(self) -> Tensor:
        """Return the learned exponents w [V]."""
        return F.softplus(self.theta).expand(self.vocab_size)

    def draw(self, key: DrawKey, x_0: np.ndarray, maskable: np.ndarray) -> Draw:
        """Return times in [t_1, 1], one per pair, and masks with probability t ** w of every token.

        Masked tokens are scored with weight 1 - t_1.
        """
        assert key.global_batch_size % 2 == 0, "draws of a sequence come in pairs"
        pairs = replace(
            key, indices=[index // 2 for index in key.indices], global_batch_size=key.global_batch_size // 2
        )
        t, is_masked = self._masks(
            key.seed,
            MASK,
            [(key.step, index) for index in key.indices],
            times(self.process.times, pairs)[:, 0],
            x_0,
            maskable,
        )
        scored = np.flatnonzero(is_masked)
        return make_draw(t, is_masked, scored, np.full(len(scored), 1 - T_1), maskable)

    def evaluation_draw(
        self, seed: int, keys: Sequence[tuple[int, int]], t: np.ndarray, x_0: np.ndarray, maskable: np.ndarray
    ) -> Draw:
        """Return one mask for each pair (number of the draw, sequence).

        Every maskable position is scored, because each has a reconstruction term.
        """
        t, is_masked = self._masks(seed, EVALUATION_MASK, keys, t, x_0, maskable)
        scored = np.flatnonzero(maskable)
        return make_draw(t, is_masked, scored, np.ones(len(scored)), maskable)

    def count(self, draw: Draw) -> int:
        """Return the number of tokens, over all draws of a sequence."""
        return draw.num_maskable

    def token_nll(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Return [R] nats: the contributions of the positions to the bound at this t, reconstruction included."""
        draw = batch.draw
        targets = batch.x_0.flatten()[draw.scored]
        integrand = self._integrand(denoiser, batch)[0] * draw.is_masked.flatten()[draw.scored]
        return (1 - T_1) * integrand + self._reconstruction(targets)

    def training_nats(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Return [R] nats: the contributions of masked positions to the bound, without the reconstruction."""
        return batch.draw.weight * self._integrand(denoiser, batch)[0]

    def forward(self, denoiser: Denoiser, batch: Batch) -> LossSum:
        """Return the surrogate whose gradient is that of the bound.

        It is L^1 + L^2 + stop(L^1 - L^2) (log q(x^1) - log q(x^2)), summed over pairs.
        """
        draw, (num_draws, num_positions) = batch.draw, batch.x_0.shape
        integrand, nll = self._integrand(denoiser, batch)
        zeros = torch.zeros(num_draws, dtype=integrand.dtype, device=integrand.device)
        losses = zeros.index_add(0, draw.scored // num_positions, draw.weight * integrand).view(-1, 2)  # [pairs, 2]
        log_q = self._log_q(batch).view(-1, 2)
        reconstruction = (self._reconstruction(batch.x_0) * draw.maskable).sum()
        advantage = (losses[:, 0] - losses[:, 1]).detach()
        surrogate = losses.sum() + (advantage * (log_q[:, 0] - log_q[:, 1])).sum() + reconstruction
        masked_nll = (nll.detach() * draw.is_scored).sum()
        return LossSum(surrogate, {"masked_nll": masked_nll}, {"bound": (losses.sum() + reconstruction).detach()})

    def _masks(
        self,
        seed: int,
        stream: int,
        keys: Sequence[tuple[int, int]],
        t: np.ndarray,
        x_0: np.ndarray,
        maskable: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return times [B] in [t_1, 1) and masks [B, L] with probability t ** w of every token."""
        exponents = self.exponents.detach().double().cpu().numpy()
        t = np.minimum(T_1 + (1 - T_1) * t, _LATEST)
        probability = t[:, None] ** exponents[np.minimum(x_0, self.vocab_size - 1)]
        return t, (uniforms(seed, stream, keys, maskable.shape[1]) < probability) & maskable

    def _integrand(self, denoiser: Denoiser, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return [R] nats each: the bracket over t, and -log mu_x."""
        draw, exponents = batch.draw, self.exponents

        def bracket(logits: Tensor, targets: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            log_mu = logits.log_softmax(-1)  # one pass over the vocabulary for both
            nll = -log_mu.gather(1, targets[:, None])[:, 0]
            return (log_mu.exp() @ exponents.to(logits) - exponents[targets] * (1 - nll)) / t, nll

        hidden = denoiser.hidden(self.process.inputs(denoiser, batch), batch.visibility)
        t = draw.t[draw.scored // batch.x_0.shape[1]]
        return reduce_scored(denoiser, scored_rows(denoiser, hidden, draw), bracket, batch, t)

    def _log_q(self, batch: Batch) -> Tensor:
        """Return [B] log q(x_t | x_0) = sum over masked of w_x ln t + sum over unmasked of ln(1 - t ** w_x)."""
        log_p = self._exponents_of(batch.x_0) * batch.draw.t.log()[:, None]  # [B, L], below 0
        return (torch.where(batch.draw.is_masked, log_p, torch.log(-torch.expm1(log_p))) * batch.draw.maskable).sum(1)

    def _reconstruction(self, x: Tensor) -> Tensor:
        """Return the expected -log p(x_0 | x_{t_1}) in nats of tokens x [...], which only masked tokens have."""
        log_p = self.exponents * math.log(T_1)  # [V]
        of_x = self._exponents_of(x) * math.log(T_1)
        return of_x.exp() * (log_p.logsumexp(0) - of_x)

    def _exponents_of(self, x: Tensor) -> Tensor:
        return self.exponents[x.clamp(max=self.vocab_size - 1)]
