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
    """Weights of the terms. The confidence is summed over masked tokens and divided as the loss is; the two others are means over all tokens."""

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

    def over_tokens(self, denoiser: Denoiser, batch: Batch, states: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The terms that do not depend on what is masked, by name: weighted sums over all maskable positions."""
        found = {}
        past = Visibility("causal", document_ids=batch.visibility.document_ids)
        maskable = batch.draw.maskable
        if self.autoregressive_weight:
            hidden = denoiser.hidden(batch.x_0, past).flatten(0, 1)  # [B * L, D]
            rows = hidden[denoiser.rows_for(torch.arange(len(hidden), device=hidden.device))]
            is_context = ~maskable.flatten()
            # As in `reduce_scored`: what is not scored is finite whatever its logits are.
            targets = batch.x_0.flatten().masked_fill(is_context, 1 if denoiser.mask_id == 0 else 0)
            nll = denoiser.reduce_logits(rows.masked_fill(is_context[:, None], 0.0), cross_entropy, targets)
            found["autoregressive"] = self.autoregressive_weight * nll.masked_fill(is_context, 0.0).sum()
        if self.alignment_weight:
            assert self.teacher is not None, "alignment needs the frozen model"
            with torch.no_grad():
                targets_by_layer = self.teacher(batch.x_0, past)
            blocks = zip(states[1:], targets_by_layer[1:], strict=True)
            by_block = [1 - F.cosine_similarity(own.float(), theirs.float(), dim=-1) for own, theirs in blocks]
            distance = torch.stack(by_block).mean(0)  # [B, L]
            found["alignment"] = self.alignment_weight * distance.masked_fill(~maskable, 0.0).sum()
        return found
