"""Samples block by block over a KV cache; one network call serves all slots, each at its own block and step.

A finished block's keys and values are those of its clean tokens: one call over the finished block writes them into the
cache (BD3-LM, arXiv 2503.09573, section 3.1). A position that the last committed hidden state predicts (with shift: the
first position of a block) is sampled without a call. With shift, blocks of one token are therefore autoregressive
decoding with a KV cache. K: positions of a block; A: slots in use, which are always the first ones. The state of the
slots is on the host: a call copies tokens and wanted positions to the device, and tokens and confidence back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from dlm_ray.diffusion.denoiser import Denoiser
from dlm_ray.diffusion.samplers.adjust import Adjust
from dlm_ray.diffusion.samplers.encoder import Encoder
from dlm_ray.diffusion.samplers.proposals import BlockProposer
from dlm_ray.diffusion.samplers.requests import GenerationOutput, Request, SamplingParams, SequenceState
from dlm_ray.diffusion.samplers.rules import Canvas, SelectionRule
from dlm_ray.diffusion.samplers.slot_tensors import SlotTensors
from dlm_ray.diffusion.samplers.slots import Slot, SlotState, by_params, num_steps, times, window
from dlm_ray.diffusion.visibility import Visibility


class BlockSampler:
    """Denoises and commits blocks in slots: `add` requests, then call `tick` until they are in `finished`.

    `slots.SlotState` draws the states of a slot.

    Args:
        denoiser: a network that attends in blocks of `block_tokens`, or an autoregressive one with blocks of 1.
        rule: selects what a step reveals.
        block_tokens: K. Blocks begin at multiples of K, whatever the length of the prompt.
        capacity_tokens: length of the context in positions, a multiple of K and at least two blocks. A sequence that
            exceeds it is encoded again from a start token and its last half context, as training sequences begin
            (BD3-LM slides a window, section 6.2).
        num_slots: maximum number of requests at once; each candidate counts as one.
        num_steps: T, the steps of a block, for rules with times.
        grid: as in `whole_canvas.sample`.
        temperature, top_p: as in `drawing.draw_tokens`.
        adjust: changes the logits; its rows are the numbers of requests, its positions count from the start token.
        fixed_shapes: every call has all slots, all rows of logits and the same number of keys, so that a sequence has
            the same bits whether it is sampled with or without others.
        prefix_bytes: memory for beginnings of prompts, which later requests with the same beginning reuse; 0 keeps
            none.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        rule: SelectionRule,
        *,
        block_tokens: int,
        capacity_tokens: int,
        num_slots: int,
        num_steps: int,
        grid: str = "uniform",
        temperature: float = 1.0,
        top_p: float = 1.0,
        adjust: Adjust | None = None,
        fixed_shapes: bool = False,
        prefix_bytes: int = 0,
    ):
        is_valid = capacity_tokens % block_tokens == 0 and capacity_tokens >= 2 * block_tokens
        assert is_valid, f"{capacity_tokens} positions in blocks of {block_tokens}"
        self.denoiser, self.adjust, self.fixed_shapes = denoiser, adjust, fixed_shapes
        self.params = SamplingParams(rule, num_steps, grid, temperature, top_p)
        self.block_tokens, self.capacity_tokens = block_tokens, capacity_tokens
        self.cache = denoiser.new_cache(num_slots, capacity_tokens, fixed_shapes=fixed_shapes)
        self.finished: list[GenerationOutput] = []
        self.num_denoising_calls = self.num_blocks = self._num_committing_calls = 0
        self._visibility = Visibility("bidirectional", block_tokens=block_tokens)
        self._encoder = Encoder(
            denoiser,
            self.cache,
            self._visibility,
            block_tokens=block_tokens,
            capacity_tokens=capacity_tokens,
            prefix_bytes=prefix_bytes,
            fixed_shapes=fixed_shapes,
        )
        self._proposer = BlockProposer(denoiser, adjust, fixed_shapes)
        # The index of the hidden state that predicts each position of a block, in [last committed one ; the block's].
        self._row_of = denoiser.rows_for(torch.arange(block_tokens, 2 * block_tokens)) - block_tokens + 1  # [K]
        assert bool((self._row_of >= 0).all()), "a position is predicted from its block or from the position before it"
        self._slots: list[Slot] = []  # the slots in use
        self._tensors = SlotTensors(num_slots, block_tokens, window(self.params, block_tokens))

    @property
    def num_active(self) -> int:
        """A, the number of slots in use."""
        return len(self._slots)

    @property
    def num_cache_calls(self) -> int:
        """The number of network calls that only filled the cache."""
        return self._encoder.num_calls + self._num_committing_calls

    def add(self, requests: Sequence[Request]) -> None:
        """Put requests into free slots and encode the whole blocks of their prompts; if that raises, add none."""
        first = self.num_active
        try:
            self._add(first, requests)
        except BaseException:
            for slot in range(first, min(self.num_active, len(self._tensors))):
                self.cache.release(slot)
            del self._slots[first:]
            raise

    def _add(self, first: int, requests: Sequence[Request]) -> None:
        for request in requests:
            assert 0 < len(request.prompt) < self.capacity_tokens, "a prompt has a start token and leaves room"
            sequence, params = SequenceState(request, list(request.prompt)), request.params or self.params
            for candidate in range(request.candidates):
                self._slots.append(Slot(sequence, candidate, request.random(0, candidate), params))
        assert self.num_active <= len(self._tensors), f"{self.num_active} requests in {len(self._tensors)} slots"
        added = self._slots[first:]
        self._tensors.reserve_window(max((window(slot.params, self.block_tokens) for slot in added), default=0))
        lengths = [len(slot.sequence.ids) // self.block_tokens * self.block_tokens for slot in added]
        prompts = [slot.sequence.ids[:length] for slot, length in zip(added, lengths, strict=True)]
        self._encode(first, prompts, are_prompts=True)
        for number, length in enumerate(lengths, first):
            self._slots[number].sequence.num_encoded = length
            self._begin(number)

    def remove(self, request: Request) -> None:
        """Free the slots of a cancelled request, which will not be in `finished`."""
        for slot in self._slots:
            if slot.sequence.request is request:
                slot.state = SlotState.LEAVING
        self._leave()

    def running(self) -> Iterator[tuple[SequenceState, Tensor, Tensor, Tensor]]:
        """Iterate over the sequences in slots and their current blocks.

        Yields:
            The sequence; the ids [K] of its block, where they are masked [K], and the log-probability [K] of the rest.
        """
        tensors = self._tensors
        for number, slot in enumerate(self._slots):
            if slot.candidate == 0:
                yield slot.sequence, tensors.ids[number], tensors.is_masked[number], tensors.confidence[number]

    def canvas(self) -> Canvas:
        """Return the current blocks [A, K] of all slots in use."""
        return self._tensors.select(range(self.num_active))

    def tick(self, only: Collection[Request] | None = None) -> None:
        """Call the network once over all slots in use; each slot denoises its block or commits it.

        A tick that raises leaves every slot before or after a step, never within one. It may be repeated, with the same
        requests or others.

        Args:
            only: the requests that take part, all if None; the others do not advance, and the network does not see
                their blocks.
        """
        self._encode_again(self._slots_in(SlotState.FULL, only))
        self._advance(only)
        needs_forward = self._slots_in(SlotState.NEEDS_FORWARD, only)
        committing = self._slots_in(SlotState.COMMITTING, only)
        if not (needs_forward or committing):
            return
        num_slots = len(self._tensors) if self.fixed_shapes else self.num_active
        hidden = self._forward(num_slots, needs_forward, committing, only)  # [A, K, D]
        if needs_forward:
            sequences = dict.fromkeys(self._slots[slot].sequence for slot in needs_forward)
            rows = torch.cat([self.cache.last_rows[:num_slots, None], hidden], 1)  # [A, 1 + K, D]
            rows = rows if len(needs_forward) == num_slots else rows[needs_forward]
            self._reveal(needs_forward, rows, num_slots * self.block_tokens)
            self.num_denoising_calls += 1
            for sequence in sequences:
                sequence.num_denoising_calls += 1
        else:
            self._num_committing_calls += 1
        self._commit(committing, hidden)
        self._leave()

    def _forward(
        self, num_slots: int, needs_forward: list[int], committing: list[int], only: Collection[Request] | None
    ) -> Tensor:
        """Return the hidden states [A, K, D] of the blocks in the first `num_slots` slots."""
        x_t, mask_id = self._tensors.ids[:num_slots], self.denoiser.mask_id
        assert mask_id is not None or not needs_forward, (
            "without a mask token, every position is predicted from the position before it"
        )
        if mask_id is not None:
            x_t = x_t.masked_fill(self._tensors.is_masked[:num_slots], mask_id)
        if only is not None:
            is_paused = torch.ones(num_slots, dtype=torch.bool)
            is_paused[needs_forward + committing] = False
            x_t = x_t.masked_fill(is_paused[:, None], 0)
        return self.denoiser.hidden(x_t.to(self.cache.last_rows.device), self._visibility, self.cache)

    def _commit(self, slots: list[int], hidden: Tensor) -> None:
        """Keep the keys and values that the last call wrote for the finished blocks, and begin the next blocks."""
        for sequence in dict.fromkeys(self._slots[slot].sequence for slot in slots):
            sequence.num_encoded += self.block_tokens
            sequence.num_cache_calls += 1
        for slot in slots:
            self.cache.commit(slot, self.block_tokens, hidden[slot, -1])
            if self.cache.lengths[slot] == self.capacity_tokens:
                self._slots[slot].state = SlotState.FULL
                self.cache.release(slot)  # if the next call fails, blocks of other slots still fit into the cache
            else:
                self._begin(slot)
        self._encode_again([slot for slot in slots if self._slots[slot].state is SlotState.FULL])

    def _slots_in(self, state: SlotState, only: Collection[Request] | None) -> list[int]:
        """Return the slots in a state whose requests take part."""
        return [
            number
            for number, slot in enumerate(self._slots)
            if slot.state is state and (only is None or slot.sequence.request in only)
        ]

    def _begin(self, number: int) -> None:
        """Begin the block after the committed ones: mask all positions but those that the prompt gives."""
        slot = self._slots[number]
        sequence = slot.sequence
        self._tensors.reset(number, sequence.ids[sequence.num_encoded :])
        slot.state = SlotState.ADVANCING
        slot.random = sequence.request.random(sequence.num_encoded // self.block_tokens, slot.candidate)
        self._tensors.refill_uniform(number, slot.random, window(slot.params, self.block_tokens))

    def _encode(self, first: int, rows: list[list[int]], *, are_prompts: bool) -> None:
        """Encode whole blocks of clean tokens into the empty slots from `first` on."""
        costs = self._encoder.encode(first, rows, are_prompts=are_prompts)
        for slot, cost in zip(self._slots[first:], costs, strict=False):
            if slot.candidate == 0:
                slot.sequence.num_cache_calls += cost.num_calls
                slot.sequence.num_cached_tokens += cost.num_cached_tokens

    def _encode_again(self, full: list[int]) -> None:
        """Replace the context of full slots by its last half, whose keys then do not depend on the dropped half."""
        keep = max(self.block_tokens, self.capacity_tokens // 2 // self.block_tokens * self.block_tokens)
        while full:
            count = next((n for n in range(1, len(full)) if full[n] != full[0] + n), len(full))  # adjacent slots
            for slot in full[:count]:
                self.cache.release(slot)
            sequences = [self._slots[slot].sequence for slot in full[:count]]
            rows = [[state.ids[0], *state.ids[state.num_encoded - keep + 1 : state.num_encoded]] for state in sequences]
            self._encode(full[0], rows, are_prompts=False)
            for slot in full[:count]:
                self._begin(slot)
            full = full[count:]

    def _advance(self, only: Collection[Request] | None) -> None:
        """Take every slot to its next network call.

        Skips steps without an effect, and samples positions that the last committed hidden state predicts.
        """
        while True:
            advancing = self._slots_in(SlotState.ADVANCING, only)
            for params, indices in by_params([self._slots[slot] for slot in advancing]):
                self._find_steps(params, [advancing[index] for index in indices])
            waiting = self._slots_in(SlotState.NEEDS_FORWARD, only)
            needs_call = (self._tensors.wanted[waiting] & (self._row_of > 0)).any(1).tolist()
            predicted = [slot for slot, needed in zip(waiting, needs_call, strict=True) if not needed]
            if predicted:
                self._reveal(predicted, self.cache.last_rows[predicted][:, None], len(self._tensors))
            self._leave()
            if not (advancing or predicted):
                return

    def _find_steps(self, params: SamplingParams, slots: list[int]) -> None:
        """Move each slot to its next step that has an effect, or to the next window of steps, or finish its block."""
        tensors = self._tensors
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
                self._finish_block(slot)

    def _set_step(self, params: SamplingParams, slots: list[int], step: Tensor) -> None:
        """Set the steps [S], within the window of random numbers or the first of the next window."""
        before, self._tensors.step[slots] = self._tensors.step[slots], step
        if not params.rule.is_timed:
            return
        width = window(params, self.block_tokens)
        is_new_window = (step != before) & (step % width == 0) & (step < num_steps(params, self.block_tokens))
        for index in is_new_window.nonzero()[:, 0].tolist():
            self._tensors.refill_uniform(slots[index], self._slots[slots[index]].random, width)

    def _reveal(self, slots: list[int], rows: Tensor, fixed_rows: int) -> None:
        """Take one step of some slots: propose tokens where they are wanted, and reveal those that the rule selects.

        Args:
            slots: S slots.
            rows: [S, 1 or 1 + K, D]: the last committed hidden state, and those of the block if they are wanted.
            fixed_rows: number of rows of logits with fixed shapes.
        """
        tensors, index = self._tensors, torch.tensor(slots)
        step, wanted = tensors.step[index], tensors.wanted[index]  # [S], [S, K]
        groups = by_params([self._slots[slot] for slot in slots])
        row, position = wanted.nonzero(as_tuple=True)  # [n]
        width = torch.tensor([window(self._slots[slot].params, self.block_tokens) for slot in slots])
        proposed, ranked, log_p = self._proposer.propose(
            rows.flatten(0, 1)[(row * rows.shape[1] + self._row_of[position]).to(rows.device)],
            tensors.uniform[index[row], (step % width)[row], 0, position],
            position,
            row,
            [self._slots[slot] for slot in slots],
            fixed_rows,
        )
        canvas = tensors.select(index)
        confidence = torch.full(wanted.shape, float("-inf"), dtype=torch.float64)
        tokens, token_log_p = torch.zeros_like(canvas.ids), torch.zeros_like(confidence)
        confidence[wanted], tokens[wanted], token_log_p[wanted] = ranked, proposed, log_p
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
        tensors.confidence[index] = torch.where(selected, token_log_p, tensors.confidence[index])
        tensors.is_masked[index] = is_masked = (canvas.is_masked & ~selected) | tensors.remasked_again[index]
        for slot, is_finished in zip(slots, (~is_masked.any(1) & is_over).tolist(), strict=True):
            self._slots[slot].state = SlotState.ADVANCING
            if is_finished:
                self._finish_block(slot)

    def _finish_block(self, slot: int) -> None:
        """Mark a block as clean; once all its candidates are clean, append the one that is kept to the sequence."""
        self._slots[slot].state = SlotState.CLEAN
        sequence = self._slots[slot].sequence
        request, group = sequence.request, [slot]
        if request.candidates > 1:
            group = [number for number, other in enumerate(self._slots) if other.sequence is sequence]
        if any(self._slots[number].state is not SlotState.CLEAN for number in group):
            return
        num_given = len(sequence.ids) - sequence.num_encoded
        blocks = [ids[num_given:] for ids in self._tensors.ids[group].tolist()]
        best = 0
        if len(group) > 1:
            end = len(request.prompt) + request.length_tokens
            candidates = [(sequence.ids + ids)[:end] for ids in blocks]
            best = request.choose(sequence.num_encoded // self.block_tokens, candidates)
            self._tensors.ids[group] = self._tensors.ids[group[best]].clone()
        sequence.append(blocks[best])
        self.num_blocks += 1
        for number in group:
            self._slots[number].state = SlotState.LEAVING if sequence.stopped_by else SlotState.COMMITTING

    def _leave(self) -> None:
        """Free the slots of finished requests; the last slot in use moves into each of them."""
        leaving = [number for number, slot in enumerate(self._slots) if slot.state is SlotState.LEAVING]
        for number in reversed(leaving):
            slot, last = self._slots[number], self.num_active - 1
            if slot.candidate == 0 and slot.sequence.stopped_by is not None:
                self.finished.append(slot.sequence.output())
            if number != last:
                self.cache.fork(last, number)
                self._tensors.move(last, number)
            self._slots[number] = self._slots[last]
            self._slots.pop()
            self.cache.release(last)
