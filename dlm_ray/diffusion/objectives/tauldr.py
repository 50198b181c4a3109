"""tauLDR (Campbell et al., arXiv 2205.14987) for the absorbing process: MD4's bound, estimated from the reverse rates.

L(x_0) = int_0^1 beta(t) E_{x_t} [ sum_{i unmasked in x_t} -log p(x_0^i | x_t with i masked) ] dt,   beta = -alpha' / alpha   (MD4, appendix)

Every term needs a network call of its own. Two estimators take one call: both mask one more token i, uniform among the n unmasked ones;
`one_token` scores i alone, with weight beta n; `all_masked` (what the released code reduces to) takes the mean over all M masked tokens,
any of which could have been the one.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from torch import Tensor

from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.draws import JUMP, Draw, DrawKey, generator, make_draw
from dlm_ray.diffusion.objectives.masked import Masked

# The largest float32 below 1: at t = 1 nothing is unmasked, and beta is infinite.
_LATEST = 1 - 2.0**-24


class TauLDR(Masked):
    """One jump from x_t, then masked cross-entropy; evaluated by MD4's form of the same bound, which varies less."""

    def __init__(
        self,
        process: Absorbing,
        *arguments: Any,
        estimator: Literal["one_token", "all_masked"] = "one_token",
        **options: Any,
    ):
        super().__init__(process, *arguments, **options)
        self.schedule, self.estimator = process.schedule, estimator

    def draw(self, key: DrawKey, x_0: np.ndarray, maskable: np.ndarray) -> Draw:
        """Masks of x_t with one position more, and what is scored with which weight."""
        before = self.process.draw(key, maskable)
        is_masked = before.is_masked.numpy()
        unmasked = maskable & ~is_masked
        num_unmasked = unmasked.sum(1)
        rows = np.flatnonzero(num_unmasked)
        place = np.array(
            [generator(key.seed, JUMP, key.step, key.rows[row]).integers(num_unmasked[row]) for row in rows.tolist()],
            dtype=np.int64,
        )
        jumped = np.zeros_like(is_masked)
        jumped[rows, [np.flatnonzero(unmasked[row])[i] for row, i in zip(rows, place, strict=True)]] = True
        return self.after_jump(before.t.double(), is_masked, jumped, maskable)

    def after_jump(self, t: Tensor, is_masked: np.ndarray, jumped: np.ndarray, maskable: np.ndarray) -> Draw:
        """Times [B], masks [B, L] of x_t, and the one position more [B, L] (none where all is masked): what is scored with which weight."""
        num_unmasked = (maskable & ~is_masked).sum(1)  # [B], before the jump
        is_masked = is_masked | jumped
        t = t.clamp(max=_LATEST)
        rate = (-self.schedule.alpha_prime(t) / self.schedule.alpha(t)).numpy()
        if self.estimator == "one_token":
            chosen, weight = jumped, rate * num_unmasked
        else:
            chosen, weight = (
                is_masked & (num_unmasked > 0)[:, None],
                rate * num_unmasked / np.maximum(1, is_masked.sum(1)),
            )
        scored = np.flatnonzero(chosen)
        return make_draw(t.numpy(), is_masked, scored, weight[scored // maskable.shape[1]], maskable)
