"""D3PM-absorb (Austin et al., arXiv 2107.03006) as its code computes it: a KL of posteriors with a small epsilon.

L(x_0) = sum_{i=1..T} E_{x_t} KL( q(x_s | x_t, x_0) || p(x_s | x_t) ),   t = i/T, s = (i-1)/T,
q(x_s | x_t, x_0) ~ q(x_s | x_0) q(x_t | x_s),   p(x_s | x_t) ~ (sum_v mu_v q(x_s | x_0 = v)) q(x_t | x_s)

Both are computed from logarithms of products in which most factors are 0, so epsilon is added to every factor. That
makes the value wrong (MD4's authors and `tests/diffusion/test_identities.py` show by how much), and a small epsilon
diverges. Without epsilon the sum is MD4's discrete-time loss, which is logged as `closed_form` and which evaluation
reports. The last step, to s = 0, is computed like all others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from dlm_ray.diffusion.absorbing import Absorbing, step_before
from dlm_ray.diffusion.denoiser import (
    Batch,
    Denoiser,
    LossSum,
    NetworkFacts,
    cross_entropy,
    reduce_scored,
    scored_rows,
)
from dlm_ray.diffusion.draws import Draw, DrawKey, make_draw
from dlm_ray.diffusion.objectives.masked import LossOptions, Masked, loss_options
from dlm_ray.diffusion.settings import ObjectiveSettings


class D3pm(Masked):
    """The literal variational bound in T steps. It scores every token, because epsilon gives unmasked ones a KL, too.

    Args:
        process: the absorbing process, with its number of timesteps T.
        epsilon: added to every factor of a posterior (1e-6 in the authors' code).
        options: as in `Masked`.
    """

    def __init__(self, process: Absorbing, *, epsilon: float = 1e-6, **options: Unpack[LossOptions]):
        super().__init__(process, **options)
        assert process.num_timesteps is not None, "D3PM has discrete times"
        self.schedule, self.num_timesteps, self.epsilon = process.schedule, process.num_timesteps, epsilon

    @classmethod
    def build(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> D3pm:
        """Return the objective for a recipe's `objective` section; T is 1000 if it has no `num_timesteps`."""
        process = replace(Absorbing.build(settings, facts), num_timesteps=settings["num_timesteps"] or 1000)
        return cls(process, epsilon=settings["posterior_epsilon"], **loss_options(settings))

    @classmethod
    def restore(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> Masked:
        """Return `Masked`: the bound is MD4's form of the same sum, in continuous time."""
        return Masked.build(settings, facts)

    def draw(self, key: DrawKey, x_0: np.ndarray, maskable: np.ndarray) -> Draw:
        """Return t and masks of the process; every maskable position is scored with weight T."""
        masks = self.process.draw(key, maskable)
        scored = np.flatnonzero(maskable)
        return make_draw(
            masks.t.numpy(), masks.is_masked.numpy(), scored, np.full(len(scored), float(self.num_timesteps)), maskable
        )

    def training_nats(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Return [R] nats: the weighted KL of every token."""
        return batch.draw.weight * self._kl(denoiser, batch)[0]

    def forward(self, denoiser: Denoiser, batch: Batch) -> LossSum:
        """Return the literal sum, and the closed form to log."""
        kl, closed = self._kl(denoiser, batch)
        return LossSum((batch.draw.weight * kl).sum(), by_token={"closed_form": (batch.draw.weight * closed).sum()})

    def _kl(self, denoiser: Denoiser, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return [R] nats each: the literal KL of a token, and its closed form without a gradient."""
        draw = batch.draw
        sequence = draw.scored // batch.x_0.shape[1]  # [R]
        alpha_t = self.schedule.alpha(draw.t)[sequence]
        alpha_s = 1 - self.schedule.mask_probability(step_before(draw.t, self.num_timesteps))[sequence]
        is_masked = draw.is_masked.flatten()[draw.scored]
        hidden = denoiser.hidden(self.process.inputs(denoiser, batch), batch.visibility)
        rows = scored_rows(denoiser, hidden, draw)
        kl, nll = reduce_scored(denoiser, rows, self.posterior_kl, batch, is_masked, alpha_s, alpha_t)
        return kl, nll.detach() * is_masked * (alpha_s - alpha_t) / (1 - alpha_t)

    def posterior_kl(
        self, logits: Tensor, x_0: Tensor, is_masked: Tensor, alpha_s: Tensor, alpha_t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return [n] the KL over the V tokens and the mask, and [n] -log mu_{x_0}.

        Args:
            logits: [n, V].
            x_0, is_masked, alpha_s, alpha_t: [n] each.
        """
        onehot = torch.nn.functional.one_hot(x_0, logits.shape[1]).to(logits)  # [n, V]
        stays = (alpha_t / alpha_s)[:, None]
        given_s = torch.where(is_masked[:, None], 1 - stays, stays * onehot)  # q(x_t | x_s = v)
        given_s = torch.cat([given_s, is_masked[:, None].to(logits)], 1)  # a mask stays a mask
        mask = (1 - alpha_s)[:, None]
        log_given_s = (given_s + self.epsilon).log()
        q_logits = (torch.cat([alpha_s[:, None] * onehot, mask], 1) + self.epsilon).log() + log_given_s
        p_logits = (torch.cat([alpha_s[:, None] * logits.softmax(-1), mask], 1) + self.epsilon).log() + log_given_s
        log_q, log_p = q_logits.log_softmax(-1), p_logits.log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1), cross_entropy(logits, x_0)
