"""What today's systems add to the masked loss, each off by default: sharper confidence, an AR term, alignment with the AR model.

(Two more are switches of the forward process: complementary mask pairs, and Dream's context weights.)
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
    """Weights of the terms; every sum is over tokens, so that it is divided as the loss is."""

    confidence_weight: float = 0.0
    """CAP (LLaDA2.0): the entropy of p at masked positions whose most probable token is already the right one."""
    autoregressive_weight: float = 0.0
    """Next-token cross-entropy of the same network on the clean row under causal attention (Nemotron's and I-DLM's joint loss)."""
    alignment_weight: float = 0.0
    """1 - cosine between the states after each block and those of the frozen AR model on the clean row, mean over blocks
    (REPR-ALIGN, arXiv 2605.06885)."""
    teacher: Callable[[Tensor, Visibility], tuple[Tensor, ...]] | None = None
    """The frozen AR model: clean ids [B, L] and a causal visibility -> its states as `Denoiser.states` gives them."""

    @property
    def any(self) -> bool:
        """Whether there is anything to add."""
        return bool(self.confidence_weight or self.autoregressive_weight or self.alignment_weight)

    def confidence(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """[n, V], [n] -> cross-entropy [n], and the entropy [n] where the prediction is right, 0 elsewhere."""
        log_probs = logits.log_softmax(-1)
        # A mask token among the tokens has log-probability -inf and adds nothing.
        entropy = -(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1)
        return cross_entropy(logits, targets), entropy * (logits.argmax(-1) == targets)

    def sums(
        self, denoiser: Denoiser, batch: Batch, states: tuple[Tensor, ...], confidence: Tensor | None
    ) -> dict[str, Tensor]:
        """The terms by name, weighted and summed over tokens."""
        found = {}
        past = Visibility("causal", document_ids=batch.visibility.document_ids)
        if confidence is not None:
            found["confidence"] = self.confidence_weight * (confidence * batch.draw.is_scored).sum()
        if self.autoregressive_weight:
            hidden = denoiser.hidden(batch.x_0, past).flatten(0, 1)  # [B * L, D]
            everywhere = torch.arange(len(hidden), device=hidden.device)
            rows = hidden[denoiser.rows_for(everywhere)]
            nll = denoiser.reduce_logits(rows, cross_entropy, batch.x_0.flatten())
            found["autoregressive"] = self.autoregressive_weight * (nll * batch.draw.maskable.flatten()).sum()
        if self.alignment_weight:
            assert self.teacher is not None, "alignment needs the frozen model"
            with torch.no_grad():
                targets = self.teacher(batch.x_0, past)
            blocks = zip(states[1:], targets[1:], strict=True)
            distance = torch.stack(
                [1 - F.cosine_similarity(own.float(), theirs.float(), dim=-1) for own, theirs in blocks]
            ).mean(0)  # [B, L]
            found["alignment"] = self.alignment_weight * (distance * batch.draw.maskable).sum()
        return found
