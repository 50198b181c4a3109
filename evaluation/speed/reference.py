"""Block diffusion in the way of BD3-LM's code, to be compared with: the same loss, and three things done otherwise, each a switch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_ray.diffusion.absorbing import Absorbing
from dlm_ray.diffusion.denoiser import Batch, Denoiser, LossSum
from dlm_ray.diffusion.draws import Draw, DrawKey, generator, make_draw, times
from dlm_ray.diffusion.objectives import Block
from dlm_ray.models import attention

_REDRAWN = 101  # a stream of random numbers of its own


class ReferenceBlock(Block):
    """What BD3-LM's code does otherwise; without shift, as there.

    Args:
        process: of the objective that it is compared with.
        block_tokens: K.
        all_logits: the vocabulary's projection for all 2L rows and a distribution for L of them, not for the masked ones alone.
        rebuilt_mask: the attention mask is built in every step.
        rejection: masks are drawn again until every block's masked share lies within the clip.
    """

    def __init__(
        self,
        process: Absorbing,
        *,
        block_tokens: int,
        all_logits: bool = True,
        rebuilt_mask: bool = True,
        rejection: bool = True,
    ):
        super().__init__(Rejecting(**vars(process)) if rejection else process, block_tokens=block_tokens)
        self.all_logits, self.rebuilt_mask = all_logits, rebuilt_mask

    def forward(self, denoiser: Denoiser, batch: Batch) -> LossSum:
        """The loss."""
        if self.rebuilt_mask:
            attention.forget_masks()
        return self._from_all_logits(denoiser, batch) if self.all_logits else super().forward(denoiser, batch)

    def _from_all_logits(self, denoiser: Any, batch: Batch) -> LossSum:
        num_rows, length = batch.x_0.shape
        halves = replace(batch.visibility, block_tokens=self.block_tokens, half=length)
        hidden = denoiser.hidden(torch.cat([self.process.inputs(denoiser, batch), batch.x_0], 1), halves)
        head = denoiser.network.get_output_embeddings().weight[: denoiser.mask_id]
        logits = F.linear(hidden, head).float()  # [B, 2L, V]
        log_p = logits[:, :length].log_softmax(-1)
        nll: Tensor = -log_p.gather(2, batch.x_0[..., None]).flatten()  # [B * L]
        return LossSum((batch.draw.weight * nll[batch.draw.scored]).sum())


@dataclass(frozen=True)
class Rejecting(Absorbing):
    """Bernoulli masks, drawn again until every block's masked share lies within the clip; never, if no count can."""

    def draw(self, key: DrawKey, maskable: np.ndarray) -> Draw:
        """As the parent's with enforced counts, by rejection."""
        assert self.clip is not None and key.block_tokens is not None, "there is a clip to enforce"
        num_blocks = maskable.shape[1] // key.block_tokens
        t = self.clip.beta + (self.clip.omega - self.clip.beta) * times(self.times, key, num_blocks).ravel()
        random = generator(key.seed, _REDRAWN, key.step, key.rows[0])
        blocks = maskable.reshape(-1, key.block_tokens)
        least, most = self.clip.counts(blocks.sum(1))
        is_masked = np.zeros_like(blocks)
        open_blocks = np.arange(len(blocks))
        while len(open_blocks):
            is_masked[open_blocks] = (
                random.random((len(open_blocks), key.block_tokens)) < t[open_blocks, None]
            ) & blocks[open_blocks]
            count = is_masked.sum(1)
            open_blocks = np.flatnonzero((count < least) | (count > most))
        scored = np.flatnonzero(is_masked)
        weight = np.repeat(1 / t, key.block_tokens)[scored]
        return make_draw(t.reshape(len(maskable), -1), is_masked.reshape(maskable.shape), scored, weight, maskable)
