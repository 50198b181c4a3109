"""The check that a sequence's numbers do not depend on its slot or on the sequences in other slots."""

from __future__ import annotations

import torch
from torch import Tensor

from dlm_ray.config.errors import UserError
from dlm_ray.diffusion.visibility import Visibility
from dlm_ray.generation.text_model import TextModel


@torch.no_grad()
def check_batch_invariance(model: TextModel, num_slots: int, block_tokens: int | None) -> None:
    """Check that one sequence has bit-identical hidden states and logits in every slot and with any other sequences.

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
    num_slots, width = ids.shape
    cache = model.denoiser.new_cache(num_slots, width * 2, fixed_shapes=True)
    cache.lengths = lengths
    hidden = model.denoiser.hidden(ids, Visibility("bidirectional", block_tokens=block_tokens), cache)
    return model.denoiser.reduce_logits(hidden.flatten(0, 1), _fingerprint).view(num_slots, width, -1)


def _fingerprint(logits: Tensor) -> Tensor:
    """Return [n, 3] float64 numbers of logits [n, V]: their sum, a weighted sum and their maximum."""
    weights = torch.arange(1, logits.shape[1] + 1, device=logits.device).double()
    return torch.stack([logits.double().sum(-1), logits.double() @ weights, logits.amax(-1).double()], 1)
