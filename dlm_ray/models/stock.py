"""A network as stock transformers runs it: the reference for speed and text of an autoregressive model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dlm_ray.models.denoiser import HuggingFaceDenoiser


class StockModel:
    """A copy of an autoregressive network with transformers' own attention, KV cache and greedy decoding.

    Args:
        denoiser: the network, without a mask token.
    """

    def __init__(self, denoiser: HuggingFaceDenoiser):
        assert denoiser.mask_id is None, "stock transformers decodes networks without a mask token"
        config = type(denoiser.network.config).from_dict(denoiser.network.config.to_dict())
        self.network: Any = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=denoiser.embedding.dtype
        )
        self.network.load_state_dict(denoiser.network.state_dict())
        self.network.to(denoiser.embedding.device).eval()

    @torch.no_grad()
    def greedy(self, prompt_ids: Sequence[int], num_tokens: int, end_id: int) -> list[int]:
        """Return at most `num_tokens` greedily decoded ids after the prompt; the last one is `end_id` if it ended."""
        ids = torch.tensor([list(prompt_ids)], device=self.network.device)
        out = self.network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=end_id,
            pad_token_id=end_id,
        )
        generated: list[int] = out[0, ids.shape[1] :].tolist()
        return generated
