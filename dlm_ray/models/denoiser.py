"""A Hugging Face causal LM as a denoiser: hidden states under any visibility, logits on demand, shift, mask token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from dlm_ray.diffusion.denoiser import Cache, PassKeyValues, ReductionT
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.models import attention
from dlm_ray.models.kv_cache import KeyValueCache, KeyValues

# The maximum number of logits in memory (float32: 128 MiB); a call with fewer keeps them for its backward pass.
CHUNK_ELEMENTS = 2**25


class HuggingFaceDenoiser(nn.Module):
    """Implements `diffusion.denoiser.Denoiser` with a network of one of the supported families.

    Args:
        config: the configuration; its vocabulary has an embedding row for the mask token, unless `mask_id` is None.
        mask_id: id of the mask token; None for a network that is only autoregressive.
        shift: whether hidden state i-1 predicts position i, as in the AR model (DiffuLLaMA); otherwise state i does.
        attention_kernel: the recipe's `model.attention`.
    """

    def __init__(self, config: PreTrainedConfig, mask_id: int | None, shift: bool, attention_kernel: str = "auto"):
        super().__init__()
        # transformers writes the attention implementation into its configuration, so it gets a copy.
        network_config = copy.deepcopy(config)
        self.network: PreTrainedModel = AutoModelForCausalLM.from_config(
            network_config, attn_implementation=attention.NAME, dtype=torch.float32
        )
        self.mask_id = mask_id
        self.shift = shift
        self.attention_kernel = attention_kernel

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer blocks, in order."""
        body = self.network.base_model
        return cast(nn.ModuleList, body.h if hasattr(body, "h") else body.layers)

    @property
    def embedding(self) -> Tensor:
        """The input embedding matrix [rows, D]."""
        return cast(Tensor, self.network.get_input_embeddings().weight)

    @property
    def head(self) -> Tensor:
        """The output embedding matrix [rows, D], which is `embedding` if the two are tied."""
        return cast(Tensor, self.network.get_output_embeddings().weight)

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens with a logit; a mask token in the last embedding row has none."""
        rows: int = self.network.config.vocab_size
        return rows - (self.mask_id == rows - 1)

    def vocabulary_names(self) -> set[str]:
        """Return the names of tensors in `network` with a row per token: the embedding, and the head unless tied."""
        matrices = (self.embedding, self.head)
        return {
            name
            for name, parameter in self.network.named_parameters()
            if any(parameter is matrix for matrix in matrices)
        }

    def hidden(self, inputs: Tensor, visibility: Visibility, kv: Cache | PassKeyValues | None = None) -> Tensor:
        """Return the hidden states [B, L, D] after the final norm, of ids [B, L] int64 or embeddings [B, L, D].

        Position ids continue across packed documents. `kv` is a cache from `new_cache`, whose slots the inputs
        continue, or keys and values from `forward_with_kv`, which the inputs attend to.
        """
        return cast(Tensor, self._run(inputs, visibility, kv).last_hidden_state)

    def states(self, inputs: Tensor, visibility: Visibility) -> tuple[Tensor, ...]:
        """Return the embeddings and the hidden states after every layer; the last is after the final norm."""
        return cast("tuple[Tensor, ...]", self._run(inputs, visibility, keep_states=True).hidden_states)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings [B, L, D] of ids [B, L]."""
        return cast(Tensor, self.network.get_input_embeddings()(input_ids))

    def new_cache(self, num_slots: int, capacity_tokens: int, *, fixed_shapes: bool = False) -> KeyValueCache:
        """Return an empty cache for this network, on its device and in its precision."""
        weight = self.embedding
        return KeyValueCache(
            self.network.config, num_slots, capacity_tokens, weight.device, weight.dtype, fixed_shapes=fixed_shapes
        )

    def forward_with_kv(self, inputs: Tensor, visibility: Visibility) -> tuple[Tensor, KeyValues]:
        """Return the hidden states, and the keys and values of this pass, which later passes can attend to."""
        kv = KeyValues()
        hidden = self.hidden(inputs, visibility, kv)
        kv.finish()
        return hidden, kv

    def _run(
        self,
        inputs: Tensor,
        visibility: Visibility,
        kv: Cache | PassKeyValues | None = None,
        *,
        keep_states: bool = False,
    ) -> BaseModelOutputWithPast:
        assert kv is None or isinstance(kv, KeyValueCache | KeyValues), "a cache or a pass of this class"
        num_sequences, num_positions = inputs.shape[:2]
        num_keys = num_positions
        if isinstance(kv, KeyValueCache):
            visibility = replace(visibility, offsets=tuple(kv.lengths[:num_sequences]))
            num_keys = kv.begin(visibility.offsets or (), num_positions)
        elif kv is not None:
            num_keys += kv.num_keys
        prepared = attention.prepare(visibility, self.attention_kernel, num_positions, num_keys, inputs.device)
        if kv is not None:
            prepared = replace(prepared, kv=kv)
        positions = visibility.positions(num_positions, inputs.device).expand(num_sequences, -1)
        kind = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        options = {"output_hidden_states": True} if keep_states else {}
        output = self.network.base_model(
            **{kind: inputs}, position_ids=positions, use_cache=False, visibility=prepared, **options
        )
        return cast(BaseModelOutputWithPast, output)

    def rows_for(self, positions: Tensor) -> Tensor:
        """Return the flat indices of the hidden states that predict flat `positions`, never a sequence's first."""
        return positions - 1 if self.shift else positions

    def reduce_logits(self, rows: Tensor, fn: Callable[..., ReductionT], *row_arguments: Tensor) -> ReductionT:
        """Apply `fn` to the logits of `rows` [N, D] in chunks that the backward pass recomputes; [N, V] never exists.

        Args:
            rows: hidden states [N, D].
            fn: takes logits [n, V] float32 and a chunk of each row argument; returns a tensor with n rows, or a
                tuple of such tensors.
            row_arguments: tensors with N rows each.
        """
        chunk = max(1, CHUNK_ELEMENTS // self.network.config.vocab_size)
        if len(rows) <= chunk:
            return fn(self._logits(rows), *row_arguments)

        def reduce_chunk(chunk_rows: Tensor, *chunk_arguments: Tensor) -> ReductionT:
            return fn(self._logits(chunk_rows), *chunk_arguments)

        chunks = zip(*(torch.split(argument, chunk) for argument in (rows, *row_arguments)), strict=True)
        reduced = [checkpoint(reduce_chunk, *arguments, use_reentrant=False) for arguments in chunks]
        if isinstance(reduced[0], tuple):
            return cast(ReductionT, tuple(torch.cat(results) for results in zip(*reduced, strict=True)))
        return cast(ReductionT, torch.cat(reduced))

    def _logits(self, rows: Tensor) -> Tensor:
        """Return logits [n, V] float32 of hidden states [n, D].

        The mask token's logit is left out if its embedding row is the last, and -inf otherwise.
        """
        head = self.head
        if self.mask_id == head.shape[0] - 1:
            return F.linear(rows, head[: self.mask_id]).float()
        logits = F.linear(rows, head).float()
        if self.mask_id is None:
            return logits
        return logits.index_fill(1, torch.tensor(self.mask_id, device=rows.device), float("-inf"))
