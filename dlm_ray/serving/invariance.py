"""The check that a sequence's numbers do not depend on its slot or on the sequences in other slots."""

from __future__ import annotations

import torch
from torch import Tensor

from dlm_ray.config.errors import UserError
from dlm_ray.diffusion.samplers.blocks import num_lookahead_rows
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.generation.text_model import TextModel
from dlm_ray.models.kv_cache import KeyValueCache


@torch.no_grad()
def check_batch_invariance(model: TextModel, num_slots: int, block_tokens: int | None) -> None:
    """Check that one sequence has bit-identical hidden states and logits in every slot and with any other sequences.

    A block also has the same bits in a row of its own, in the call that commits the block before it.

    Args:
        model: the model.
        num_slots: `engine.slots`.
        block_tokens: tokens of a block; None for a whole canvas.

    Raises:
        UserError: if the bits differ on this machine.
    """
    width = model.sequence_length if block_tokens is None else block_tokens
    sequence = torch.arange(width, device=model.device) % model.denoiser.vocab_size

    everywhere = _outputs(model, sequence.repeat(num_slots, 1), [0] * num_slots, block_tokens)
    wrong = [slot for slot in range(num_slots) if not torch.equal(everywhere[slot], everywhere[0])]
    for slot in {0, num_slots // 2, num_slots - 1}:
        ids = torch.zeros(num_slots, width, dtype=torch.int64, device=model.device)
        ids[slot] = sequence
        lengths = [0 if other == slot else width * (other % 2) for other in range(num_slots)]
        mixed = _outputs(model, ids, lengths, block_tokens)
        if not torch.equal(mixed[slot], everywhere[0]):
            wrong.append(slot)
        if block_tokens is not None and not _has_equal_lookahead(model, ids, slot, block_tokens):
            wrong.append(slot)
    if wrong:
        raise UserError(
            f"engine.batch_invariant=true: on this machine the same text in slot {wrong[0]} of {num_slots} has other "
            "bits than in slot 0; change engine.slots (multiples of 16 are the likeliest), or set "
            "engine.batch_invariant=false"
        )


def _outputs(model: TextModel, ids: Tensor, lengths: list[int], block_tokens: int | None) -> Tensor:
    """Return numbers [slots, N, ...] that depend on all bits of the hidden states, and for blocks of the logits.

    Args:
        model: the model.
        ids: [slots, N].
        lengths: committed positions in the cache of every slot; used for blocks only.
        block_tokens: tokens of a block; None for a whole canvas.
    """
    if block_tokens is None:
        return model.denoiser.hidden(ids, Visibility(model.pattern, document_ids=torch.zeros_like(ids)))
    cache = _new_cache(model, ids)
    cache.lengths = lengths
    return _logits(model, _hidden(model, ids, cache, [])[: len(ids)])


def _has_equal_lookahead(model: TextModel, ids: Tensor, slot: int, block_tokens: int) -> bool:
    """Return whether a block has the same bits in the call that commits the block before it, and in the next call."""
    num_slots = len(ids)
    if not num_lookahead_rows(model.denoiser, num_slots, block_tokens):
        return True
    cache = _new_cache(model, ids)
    hidden = _hidden(model, ids, cache, [slot])
    in_its_own_row = hidden[:num_slots].clone()
    in_its_own_row[slot] = hidden[num_slots]
    cache.commit(slot, block_tokens, hidden[slot, -1])
    after = _hidden(model, ids, cache, [])
    return torch.equal(_logits(model, in_its_own_row)[slot], _logits(model, after[:num_slots])[slot])


def _new_cache(model: TextModel, ids: Tensor) -> KeyValueCache:
    """Return a cache with room for three blocks in each slot."""
    num_slots, width = ids.shape
    return model.denoiser.new_cache(num_slots, width * 3, fixed_shapes=True)


def _hidden(model: TextModel, ids: Tensor, cache: KeyValueCache, ahead: list[int]) -> Tensor:
    """Return the hidden states [rows, K, D] of a call of the block sampler with blocks `ids` [slots, K].

    The blocks after those of the slots `ahead` hold the same ids, in rows of their own.
    """
    num_slots, width = ids.shape
    num_rows = num_lookahead_rows(model.denoiser, num_slots, width)
    if num_rows:
        cache = cache.with_lookahead(num_slots, ahead, width, num_rows)
        padding = ids.new_zeros(num_rows - len(ahead), width)
        ids = torch.cat([ids, ids[ahead], padding])
    return model.denoiser.hidden(ids, Visibility("bidirectional", block_tokens=width), cache)


def _logits(model: TextModel, hidden: Tensor) -> Tensor:
    """Return the fingerprints [rows, K, 3] of the logits of hidden states [rows, K, D]."""
    prints: Tensor = model.denoiser.reduce_logits(hidden.flatten(0, 1), _fingerprint)
    return prints.view(*hidden.shape[:2], -1)


def _fingerprint(logits: Tensor) -> Tensor:
    """Return [n, 3] float64 numbers of logits [n, V]: their sum, a weighted sum and their maximum."""
    weights = torch.arange(1, logits.shape[1] + 1, device=logits.device).double()
    return torch.stack([logits.double().sum(-1), logits.double() @ weights, logits.amax(-1).double()], 1)
