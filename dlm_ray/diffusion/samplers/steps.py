"""The steps of the blocks in slots: finds the next step of each slot, and reveals what the rule of the slot selects.

S: slots of a call; K: positions of a block; D: width of the network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlm_ray.diffusion.denoiser import Denoiser
from dlm_ray.diffusion.samplers.proposals import BlockProposer
from dlm_ray.diffusion.samplers.requests import SamplingParams
from dlm_ray.diffusion.samplers.rules import Canvas
from dlm_ray.diffusion.samplers.slot_tensors import SlotTensors
from dlm_ray.diffusion.samplers.slots import Slot, SlotState, by_params, num_steps, times, window


class BlockSteps:
    """Takes the steps of the blocks in slots.

    Args:
        slots: the slots in use; the list belongs to the sampler.
        tensors: their tensors.
        proposer: proposes tokens.
        denoiser: the network, which defines which hidden state predicts a position.
    """

    def __init__(self, slots: list[Slot], tensors: SlotTensors, proposer: BlockProposer, denoiser: Denoiser):
        self.block_tokens = size = tensors.block_tokens
        self._slots, self._tensors, self._proposer = slots, tensors, proposer
        # The index of the hidden state that predicts each position of a block, in [last committed one ; the block's].
        self._row_of = denoiser.rows_for(torch.arange(size, 2 * size)) - size + 1  # [K]
        assert bool((self._row_of >= 0).all()), "a position is predicted from its block or from the position before it"

    def begin(self, number: int) -> None:
        """Begin the block at `block_start`: mask all its positions but those that the prompt gives."""
        slot = self._slots[number]
        sequence = slot.sequence
        self._tensors.reset(number, sequence.ids[sequence.block_start :])
        slot.state = SlotState.ADVANCING
        slot.random = sequence.request.random(sequence.block_start // self.block_tokens, slot.candidate)
        self._tensors.refill_uniform(number, slot.random, window(slot.params, self.block_tokens))

    def need_block(self, slots: Sequence[int]) -> list[bool]:
        """Return, per slot, whether its next step wants a position that hidden states of the block itself predict."""
        is_needed: list[bool] = (self._tensors.wanted[list(slots)] & (self._row_of > 0)).any(1).tolist()
        return is_needed

    def find(self, slots: list[int]) -> list[int]:
        """Move each slot to its next step that has an effect, or to the next window of steps; return finished slots."""
        finished = []
        for params, indices in by_params([self._slots[slot] for slot in slots]):
            finished += self._find(params, [slots[index] for index in indices])
        return finished

    def _find(self, params: SamplingParams, slots: list[int]) -> list[int]:
        tensors, finished = self._tensors, []
        step, is_found = tensors.find_steps(params, slots)
        needs_forward = tensors.wanted[slots].any(1)
        self._set_step(params, slots, step)
        for slot, found, needed in zip(slots, is_found.tolist(), needs_forward.tolist(), strict=True):
            if needed:
                self._slots[slot].state = SlotState.NEEDS_FORWARD
            elif found:  # the step only masks positions again
                tensors.is_masked[slot] |= tensors.remasked_again[slot]
                self._set_step(params, [slot], tensors.step[slot : slot + 1] + 1)
            elif tensors.step[slot] >= num_steps(params, self.block_tokens):
                finished.append(slot)
        return finished

    def _set_step(self, params: SamplingParams, slots: list[int], step: Tensor) -> None:
        """Set the steps [S], within the window of random numbers or the first of the next window."""
        before, self._tensors.step[slots] = self._tensors.step[slots], step
        if not params.rule.is_timed:
            return
        width = window(params, self.block_tokens)
        is_new_window = (step != before) & (step % width == 0) & (step < num_steps(params, self.block_tokens))
        for index in is_new_window.nonzero()[:, 0].tolist():
            self._tensors.refill_uniform(slots[index], self._slots[slots[index]].random, width)

    def reveal(self, slots: list[int], rows: Tensor, fixed_rows: int) -> list[int]:
        """Propose tokens where the next step of each slot wants them, reveal those that the rule selects.

        Args:
            slots: S slots.
            rows: [S, 1 or 1 + K, D]: the last committed hidden state, and those of the block if they are wanted.
            fixed_rows: number of rows of logits with fixed shapes.

        Returns:
            the slots whose block is finished.
        """
        tensors, index = self._tensors, torch.tensor(slots)
        step, wanted = tensors.step[index], tensors.wanted[index]  # [S], [S, K]
        tokens, confidence, log_p = self._proposals(slots, rows, fixed_rows)
        canvas = tensors.select(index)
        groups = by_params([self._slots[slot] for slot in slots])
        selected, is_over = torch.zeros_like(wanted), torch.ones(len(slots), dtype=torch.bool)
        for params, group in groups:
            part = Canvas(canvas.ids[group], canvas.is_masked[group], canvas.is_open[group])
            selected[group] = params.rule.selected(part, wanted[group], confidence[group], *times(params, step[group]))
            if params.rule.remasks:
                is_over[group] = step[group] + 1 >= num_steps(params, self.block_tokens)
        # Nothing raises from here on, so no slot is left within a step.
        for params, group in groups:
            self._set_step(params, [slots[number] for number in group], step[group] + 1)
        tensors.ids[index] = torch.where(selected, tokens, canvas.ids)
        tensors.confidence[index] = torch.where(selected, log_p, tensors.confidence[index])
        tensors.is_masked[index] = is_masked = (canvas.is_masked & ~selected) | tensors.remasked_again[index]
        for slot in slots:
            self._slots[slot].state = SlotState.ADVANCING
        is_finished = ~is_masked.any(1) & is_over
        return index[is_finished].tolist()

    def _proposals(self, slots: list[int], rows: Tensor, fixed_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, confidence and log-probability [S, K] each; where none are wanted, 0, -inf and 0."""
        tensors, index = self._tensors, torch.tensor(slots)
        wanted = tensors.wanted[index]
        row, position = wanted.nonzero(as_tuple=True)  # [n]
        width = torch.tensor([window(self._slots[slot].params, self.block_tokens) for slot in slots])
        proposed, ranked, proposed_log_p = self._proposer.propose(
            rows.flatten(0, 1)[(row * rows.shape[1] + self._row_of[position]).to(rows.device)],
            tensors.uniform[index[row], (tensors.step[index] % width)[row], 0, position],
            position,
            row,
            [self._slots[slot] for slot in slots],
            fixed_rows,
        )
        confidence = torch.full(wanted.shape, float("-inf"), dtype=torch.float64)
        tokens, log_p = torch.zeros(wanted.shape, dtype=torch.int64), torch.zeros_like(confidence)
        confidence[wanted], tokens[wanted], log_p[wanted] = ranked, proposed, proposed_log_p
        return tokens, confidence, log_p
