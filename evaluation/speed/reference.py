"""Block diffusion as BD3-LM's code implements it: the same loss with three differences, each behind a switch."""

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

_REJECTION_STREAM = 101  # its random numbers are independent of all other draws


class ReferenceBlock(Block):
    """Block diffusion with the differences of BD3-LM's code, which has no shift.

    Args:
        process: the process of the objective that it is compared with.
        block_tokens: K.
        all_logits: compute the logits of all 2L hidden states and a distribution for L of them, instead of the masked
            positions only.
        rebuilt_mask: build the attention mask in every step.
        rejection: draw masks again until the masked share of every block lies within the clip.
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
        """Return the loss of one micro-batch."""
        if self.rebuilt_mask:
            attention.forget_masks()
        return self._from_all_logits(denoiser, batch) if self.all_logits else super().forward(denoiser, batch)

    def _from_all_logits(self, denoiser: Any, batch: Batch) -> LossSum:
        """Return the loss from the logits of all positions, with the head of the `HuggingFaceDenoiser`."""
        _, length = batch.x_0.shape
        two_halves = replace(batch.visibility, block_tokens=self.block_tokens, half=length)
        hidden = denoiser.hidden(torch.cat([self.process.inputs(denoiser, batch), batch.x_0], 1), two_halves)
        head = denoiser.network.get_output_embeddings().weight[: denoiser.mask_id]
        logits = F.linear(hidden, head).float()  # [B, 2L, V]
        log_p = logits[:, :length].log_softmax(-1)
        nll: Tensor = -log_p.gather(2, batch.x_0[..., None]).flatten()  # [B * L]
        return LossSum((batch.draw.weight * nll[batch.draw.scored]).sum())


@dataclass(frozen=True)
class Rejecting(Absorbing):
    """Bernoulli masks that are drawn again until the masked share of every block lies within the clip.

    Sampling does not end if no number of masked tokens of a block is within the clip.
    """

    def draw(self, key: DrawKey, maskable: np.ndarray) -> Draw:
        """Sample masks and loss weights as `Absorbing.draw` does with enforced counts, but by rejection."""
        assert self.clip is not None and key.block_tokens is not None, "there is a clip to enforce"
        num_blocks = maskable.shape[1] // key.block_tokens
        t = self.clip.beta + (self.clip.omega - self.clip.beta) * times(self.times, key, num_blocks).ravel()
        random = generator(key.seed, _REJECTION_STREAM, key.step, key.indices[0])
        blocks = maskable.reshape(-1, key.block_tokens)
        least, most = self.clip.counts(blocks.sum(1))
        is_masked = np.zeros_like(blocks)
        rejected = np.arange(len(blocks))
        while len(rejected):
            uniforms = random.random((len(rejected), key.block_tokens))
            is_masked[rejected] = (uniforms < t[rejected, None]) & blocks[rejected]
            count = is_masked.sum(1)
            rejected = np.flatnonzero((count < least) | (count > most))
        scored = np.flatnonzero(is_masked)
        weight = np.repeat(1 / t, key.block_tokens)[scored]
        return make_draw(t.reshape(len(maskable), -1), is_masked.reshape(maskable.shape), scored, weight, maskable)
