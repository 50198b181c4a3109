"""Auxiliary losses of masked diffusion, each off by default: confidence, an AR loss, alignment with the AR base model.

Two other additions of recent systems are settings of the forward process: complementary masks and context weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dlm_ray.diffusion.denoiser import Batch, Denoiser, cross_entropy
from dlm_ray.diffusion.visibility import Visibility


@dataclass(frozen=True)
class AuxiliaryLosses:
    """Weights of the auxiliary losses.

    Confidence is a sum over masked tokens and is divided as the loss is; the other two are means over all tokens.
    """

    confidence_weight: float = 0.0
    """Weight of CAP (LLaDA2.0): the entropy of p at masked positions whose most probable token is the right one."""
    autoregressive_weight: float = 0.0
    """Weight of the next-token cross-entropy of the same network on the clean sequence with causal attention (the joint
    loss of Nemotron and I-DLM)."""
    alignment_weight: float = 0.0
    """Weight of 1 - cosine between the states after each layer and those of the frozen AR model on the clean sequence,
    mean over layers (REPR-ALIGN, arXiv 2605.06885)."""
    teacher: Callable[[Tensor, Visibility], tuple[Tensor, ...]] | None = None
    """The frozen AR model: a function of clean ids [B, L] and a causal visibility that returns `Denoiser.states`."""

    @property
    def any(self) -> bool:
        """Return whether any auxiliary loss is on."""
        return bool(self.confidence_weight or self.autoregressive_weight or self.alignment_weight)

    def confidence(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return [n] cross-entropy, and [n] entropy where the prediction is right, else 0, for logits [n, V]."""
        log_probs = logits.log_softmax(-1)
        # A mask token among the tokens has log-probability -inf and adds nothing.
        entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1)
        return cross_entropy(logits, targets), entropy * (logits.argmax(-1) == targets)

    def over_tokens(
        self, denoiser: Denoiser, batch: Batch, states: tuple[Tensor, ...], clean: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the losses that do not depend on the masks, by name: weighted sums over all maskable positions.

        Args:
            denoiser: the network.
            batch: the micro-batch.
            states: of the network's pass over x_t, for the alignment.
            clean: [B, L, D], the hidden states of x_0 under causal attention; None: the AR loss computes them.
        """
        sums = {}
        past = Visibility("causal", document_ids=batch.visibility.document_ids)
        maskable = batch.draw.maskable
        if self.autoregressive_weight:
            hidden = (denoiser.hidden(batch.x_0, past) if clean is None else clean).flatten(0, 1)  # [B * L, D]
            rows = hidden[denoiser.rows_for(torch.arange(len(hidden), device=hidden.device))]
            is_context = ~maskable.flatten()
            # As in `reduce_scored`: values of unscored positions are finite whatever their logits are.
            targets = batch.x_0.flatten().masked_fill(is_context, 1 if denoiser.mask_id == 0 else 0)
            nll = denoiser.reduce_logits(rows.masked_fill(is_context[:, None], 0.0), cross_entropy, targets)
            sums["autoregressive"] = self.autoregressive_weight * nll.masked_fill(is_context, 0.0).sum()
        if self.alignment_weight:
            assert self.teacher is not None, "alignment needs the frozen model"
            with torch.no_grad():
                targets_by_layer = self.teacher(batch.x_0, past)
            layers = zip(states[1:], targets_by_layer[1:], strict=True)
            by_layer = [1 - F.cosine_similarity(ours.float(), theirs.float(), dim=-1) for ours, theirs in layers]
            distance = torch.stack(by_layer).mean(0)  # [B, L]
            sums["alignment"] = self.alignment_weight * distance.masked_fill(~maskable, 0.0).sum()
        return sums
