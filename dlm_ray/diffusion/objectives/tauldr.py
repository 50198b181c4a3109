"""tauLDR (Campbell et al., arXiv 2205.14987) for the absorbing process: MD4's bound, estimated from the reverse rates.

L(x_0) = int_0^1 beta(t) E_{x_t} [ sum_{i unmasked in x_t} -log p(x_0^i | x_t with i masked) ] dt

with beta = -alpha' / alpha (MD4, appendix). Every term needs its own network call. Two estimators need one call: both
mask one more token i, uniform among the n unmasked ones. `one_token` scores only i, with weight beta n. `all_masked`
(what the released code reduces to) takes the mean over all M masked tokens, any of which could have been i.
"""

from __future__ import annotations

from typing import Literal, Unpack

import numpy as np
from torch import Tensor

from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.denoiser import NetworkFacts
from dlm_ray.diffusion.draws import JUMP, Draw, DrawKey, generator, make_draw
from dlm_ray.diffusion.objectives.masked import LossOptions, Masked, loss_options
from dlm_ray.diffusion.settings import ObjectiveSettings

# The largest float32 below 1: at t = 1 nothing is unmasked, and beta is infinite.
_LATEST = 1 - 2.0**-24


class TauLDR(Masked):
    """Masked cross-entropy after one jump from x_t.

    Args:
        process: the absorbing process.
        estimator: `one_token` or `all_masked`.
        options: as in `Masked`.
    """

    def __init__(
        self,
        process: Absorbing,
        *,
        estimator: Literal["one_token", "all_masked"] = "one_token",
        **options: Unpack[LossOptions],
    ):
        super().__init__(process, **options)
        self.schedule, self.estimator = process.schedule, estimator

    @classmethod
    def build(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> TauLDR:
        """Return the objective for a recipe's `objective` section."""
        process = Absorbing.build(settings, facts)
        return cls(process, estimator=settings["estimator"], **loss_options(settings))

    @classmethod
    def restore(cls, settings: ObjectiveSettings, facts: NetworkFacts) -> Masked:
        """Return `Masked`: MD4's form of the same bound, which has less variance."""
        return Masked.build(settings, facts)

    def draw(self, key: DrawKey, x_0: np.ndarray, maskable: np.ndarray) -> Draw:
        """Return the masks of x_t with one more position, the scored positions and their weights."""
        before = self.process.draw(key, maskable)
        is_masked = before.is_masked.numpy()
        unmasked = maskable & ~is_masked
        num_unmasked = unmasked.sum(1)
        jumping = np.flatnonzero(num_unmasked)  # the draws with an unmasked token
        choice = np.array(
            [generator(key.seed, JUMP, key.step, key.indices[b]).integers(num_unmasked[b]) for b in jumping.tolist()],
            dtype=np.int64,
        )
        jumped = np.zeros_like(is_masked)
        jumped[jumping, [np.flatnonzero(unmasked[b])[i] for b, i in zip(jumping, choice, strict=True)]] = True
        return self.after_jump(before.t.double(), is_masked, jumped, maskable)

    def after_jump(self, t: Tensor, is_masked: np.ndarray, jumped: np.ndarray, maskable: np.ndarray) -> Draw:
        """Return the draw for given times, masks and jumps.

        Args:
            t: [B] times.
            is_masked: [B, L] masks of x_t, before the jump.
            jumped: [B, L], the one more masked position of every sequence; none where everything is masked.
            maskable: [B, L].
        """
        num_unmasked = (maskable & ~is_masked).sum(1)  # [B], before the jump
        is_masked = is_masked | jumped
        t = t.clamp(max=_LATEST)
        rate = (-self.schedule.alpha_prime(t) / self.schedule.alpha(t)).numpy()
        if self.estimator == "one_token":
            is_scored, weight = jumped, rate * num_unmasked
        else:
            is_scored, weight = (
                is_masked & (num_unmasked > 0)[:, None],
                rate * num_unmasked / np.maximum(1, is_masked.sum(1)),
            )
        scored = np.flatnonzero(is_scored)
        return make_draw(t.numpy(), is_masked, scored, weight[scored // maskable.shape[1]], maskable)
