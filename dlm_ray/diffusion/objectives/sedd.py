"""SEDD-absorb: score entropy (Lou et al., arXiv 2310.16834).

The network gives the ratios s_v = p_t(x with v in place of a mask) / p_t(x).

With the true score at a mask, s_v = r p(x_0 = v | x_t), r = alpha / (1 - alpha), the loss of a masked token is

    -alpha'/alpha * [ sum_v s_v - r ln s_{x_0} + r (ln r - 1) ].

The network's f gives ln s_v = f_v - ln((1 - alpha) / alpha) - ln V. With Z = sum_v s_v / r = (1/V) sum_v exp f_v and
mu = softmax(f) the bracket is r [ -ln mu_{x_0} + Z - 1 - ln Z ], and the factor in front times r is MD4's weight: SEDD
is MD4's loss plus a consistency gap Z - 1 - ln Z >= 0, which is zero only for a normalised score. This form is used,
because it has no cancellation at either end of t.
"""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from dlm_ray.diffusion.absorbing import Process, build_process
from dlm_ray.diffusion.denoiser import Batch, Denoiser, LossSum, NetworkFacts, reduce_scored, scored_rows
from dlm_ray.diffusion.objectives.masked import LossOptions, Masked, loss_options
from dlm_ray.diffusion.settings import ObjectiveSettings


class Sedd(Masked):
    """Denoising score entropy of the absorbing graph. It logs the consistency gap.

    Args:
        process, options: as in `Masked`.
        vocab_size: V.
    """

    kind = "sedd"

    def __init__(self, process: Process | None = None, *, vocab_size: int, **options: Unpack[LossOptions]):
        super().__init__(process, **options)
        self.vocab_size = vocab_size

    @classmethod
    def build(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> Sedd:
        """Return the objective for a recipe's `objective` section."""
        return cls(build_process(settings, facts), vocab_size=facts.vocab_size, **loss_options(settings))

    def nll_and_gap(self, denoiser: Denoiser, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return [R] nats each: -ln mu_{x_0}, and the gap Z - 1 - ln Z."""

        def score_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            # ln Z also normalises -ln mu: one pass over the vocabulary for both.
            log_z = log_normaliser(logits, self.vocab_size)
            nll = log_z + math.log(self.vocab_size) - logits.gather(1, targets[:, None])[:, 0]
            return nll, torch.expm1(log_z) - log_z

        hidden = denoiser.hidden(self.process.inputs(denoiser, batch), batch.visibility)
        return reduce_scored(denoiser, scored_rows(denoiser, hidden, batch.draw), score_entropy, batch)

    def token_nll(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """Return [R] nats: the score entropy in units of MD4's weight; MD4's loss is one of its two terms."""
        nll, gap = self.nll_and_gap(denoiser, batch)
        return nll + gap

    def forward(self, denoiser: Denoiser, batch: Batch) -> LossSum:
        """Return the weighted sum over masked tokens; its two terms are logged without weights."""
        nll, gap = self.nll_and_gap(denoiser, batch)
        is_scored = batch.draw.is_scored
        by_name = {"masked_nll": (nll.detach() * is_scored).sum(), "consistency_gap": (gap.detach() * is_scored).sum()}
        return LossSum((batch.draw.weight * (nll + gap)).sum(), by_name)


def log_normaliser(logits: Tensor, vocab_size: int) -> Tensor:
    """Return [n] ln Z = ln (1/V) sum_v exp f_v for logits [n, V]."""
    return logits.logsumexp(-1) - math.log(vocab_size)
