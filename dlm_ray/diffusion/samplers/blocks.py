"""Samples block by block over a KV cache; one network call serves all slots, each at its own block and step.

A finished block's keys and values are those of its clean tokens (BD3-LM, arXiv 2503.09573, section 3.1). The call that
writes them into the cache has the next block in a row of its own, which sees them, and so takes the first step of it: a
block needs no call beyond those of its steps. A position that the last committed hidden state predicts (with shift: the
first position of a block) is sampled without a call of the block. With shift, blocks of one token are therefore
autoregressive decoding with a KV cache. K: positions of a block; A: slots in use, which are always the first ones. The
state of the slots is on the host: a call copies tokens and wanted positions to the device, and tokens and confidence
back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dlm_ray.diffusion.denoiser import Denoiser
from dlm_ray.diffusion.samplers.adjust import Adjust
from dlm_ray.diffusion.samplers.encoder import Encoder
from dlm_ray.diffusion.samplers.proposals import BlockProposer
from dlm_ray.diffusion.samplers.requests import GenerationOutput, Request, SamplingParams, SequenceState
from dlm_ray.diffusion.samplers.rules import Canvas, SelectionRule
from dlm_ray.diffusion.samplers.slot_tensors import SlotTensors
from dlm_ray.diffusion.samplers.slots import Slot, SlotState, window
from dlm_ray.diffusion.samplers.steps import BlockSteps
from dlm_ray.diffusion.visibility import Visibility


def num_lookahead_rows(denoiser: Denoiser, num_slots: int, block_tokens: int) -> int:
    """Return the number of rows for next blocks in a call of fixed shape.

    With one token per step, one slot in K finishes a block in each call. Of slots that finish one in the same call,
    those without a row take one call more. An autoregressive network needs no such rows.
    """
    rows = denoiser.rows_for(torch.arange(block_tokens, 2 * block_tokens))
    return -(-num_slots // block_tokens) if bool((rows >= block_tokens).any()) else 0


class BlockSampler:
    """Denoises and commits blocks in slots: `add` requests, then call `tick` until they are in `finished`.

    The diagram of `slots.SlotState` shows the states of a slot.

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
        temperature, top_p: as in `token_sampling.sample_tokens`.
        adjust: changes the logits; its rows are the numbers of requests, its positions count from the start token.
        is_context_causal: whether finished blocks attend causally, as `Block` trains with `context: clean_causal`.
        fixed_shapes: every call has the same rows, all rows of logits and the same number of keys, so that a sequence
            has the same bits whether it is sampled with or without others.
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
        is_context_causal: bool = False,
        fixed_shapes: bool = False,
        prefix_bytes: int = 0,
    ):
        is_valid = capacity_tokens % block_tokens == 0 and capacity_tokens >= 2 * block_tokens
        assert is_valid, f"{capacity_tokens} positions in blocks of {block_tokens}"
        self.denoiser, self.fixed_shapes = denoiser, fixed_shapes
        self.params = SamplingParams(rule, num_steps, grid, temperature, top_p)
        self.block_tokens, self.capacity_tokens = block_tokens, capacity_tokens
        self.cache = denoiser.new_cache(num_slots, capacity_tokens, fixed_shapes=fixed_shapes)
        self.finished: list[GenerationOutput] = []
        self.num_denoising_calls = self.num_blocks = self._num_committing_calls = 0
        self._visibility = Visibility("bidirectional", block_tokens=block_tokens)
        self._is_context_causal = is_context_causal
        self._encoder = Encoder(
            denoiser,
            self.cache,
            Visibility("causal") if is_context_causal else self._visibility,
            block_tokens=block_tokens,
            capacity_tokens=capacity_tokens,
            prefix_bytes=prefix_bytes,
            fixed_shapes=fixed_shapes,
        )
        self._slots: list[Slot] = []  # the slots in use
        self._tensors = SlotTensors(num_slots, block_tokens, window(self.params, block_tokens))
        self._steps = BlockSteps(self._slots, self._tensors, BlockProposer(denoiser, adjust, fixed_shapes), denoiser)
        self._num_lookahead_rows = num_lookahead_rows(denoiser, num_slots, block_tokens) if fixed_shapes else 0

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
            self._slots[number].sequence.block_start = length
            self._steps.begin(number)

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
        """Call the network once over all slots in use: each takes a step of its block, or commits the one before it.

        A tick that raises leaves every slot before or after a step, never within one. It may be repeated, with the same
        requests or others.

        Args:
            only: the requests that take part, all if None; the others do not advance, and the network does not see
                their blocks.
        """
        self._advance(only)
        waiting = self._slots_in(SlotState.NEEDS_FORWARD, only)
        if not waiting:
            return
        committing = [slot for slot in waiting if self._slots[slot].has_uncommitted]
        need_block = dict(zip(waiting, self._steps.need_block(waiting), strict=True))
        ahead = [slot for slot in committing if need_block[slot]]
        if self.fixed_shapes:
            ahead = ahead[: self._num_lookahead_rows]
        denoising = [slot for slot in waiting if slot in ahead or slot not in committing]
        num_slots = len(self._tensors) if self.fixed_shapes else self.num_active
        hidden = self._forward(num_slots, denoising, committing, ahead)
        self._count_call(denoising, committing)
        self._commit(committing, hidden)
        if denoising:
            lookahead_row = dict(zip(ahead, range(num_slots, num_slots + len(ahead)), strict=True))
            blocks = hidden[[lookahead_row.get(slot, slot) for slot in denoising]]
            rows = torch.cat([self.cache.last_rows[denoising][:, None], blocks], 1)  # [S, 1 + K, D]
            self._finish_blocks(self._steps.reveal(denoising, rows, num_slots * self.block_tokens))
        self._leave()

    def _forward(self, num_slots: int, denoising: list[int], committing: list[int], ahead: list[int]) -> Tensor:
        """Return the hidden states [rows, K, D] of one call.

        Args:
            num_slots: the number of rows for slots; row b holds the finished block of slot b if the slot is in
                `committing`, else its current block if it is in `denoising`.
            denoising: the slots that take a step.
            committing: the slots whose finished block is to be committed.
            ahead: the slots that are in both; their current blocks are in rows of their own after those of the slots.
        """
        tensors, cache, mask_id = self._tensors, self.cache, self.denoiser.mask_id
        num_rows = self._num_lookahead_rows if self.fixed_shapes else len(ahead)
        assert mask_id is not None or not denoising, (
            "without a mask token, every position is predicted from the position before it"
        )
        x_t = tensors.ids if mask_id is None else tensors.ids.masked_fill(tensors.is_masked, mask_id)
        ids = torch.zeros(num_slots + num_rows, self.block_tokens, dtype=torch.int64)
        ids[denoising] = x_t[denoising]
        ids[committing] = tensors.uncommitted[committing]
        ids[num_slots : num_slots + len(ahead)] = x_t[ahead]
        if num_rows:
            cache = cache.with_lookahead(num_slots, ahead, self.block_tokens, num_rows)
        visibility = self._visibility
        if self._is_context_causal and committing:
            is_clean = set(committing)
            visibility = replace(visibility, causal_sequences=tuple(row in is_clean for row in range(len(ids))))
        return self.denoiser.hidden(ids.to(self.cache.last_rows.device), visibility, cache)

    def _count_call(self, denoising: list[int], committing: list[int]) -> None:
        """Count one call, for the sampler and for the sequences that took part."""
        denoised = {self._slots[slot].sequence for slot in denoising}
        for sequence in denoised:
            sequence.num_denoising_calls += 1
        for sequence in {self._slots[slot].sequence for slot in committing} - denoised:
            sequence.num_cache_calls += 1
        self.num_denoising_calls += bool(denoised)
        self._num_committing_calls += not denoised

    def _commit(self, slots: list[int], hidden: Tensor) -> None:
        """Keep the keys and values that the last call wrote for the finished blocks of some slots."""
        for slot in slots:
            self.cache.commit(slot, self.block_tokens, hidden[slot, -1])
            self._slots[slot].has_uncommitted = False

    def _slots_in(self, state: SlotState, only: Collection[Request] | None) -> list[int]:
        """Return the slots in a state whose requests take part."""
        return [
            number
            for number, slot in enumerate(self._slots)
            if slot.state is state and (only is None or slot.sequence.request in only)
        ]

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
            rows = [[state.ids[0], *state.ids[state.block_start - keep + 1 : state.block_start]] for state in sequences]
            self._encode(full[0], rows, are_prompts=False)
            for slot in full[:count]:
                self._steps.begin(slot)
            full = full[count:]

    def _advance(self, only: Collection[Request] | None) -> None:
        """Take every slot to its next network call.

        Begins the blocks after finished ones, skips steps without an effect, and samples positions that the last
        committed hidden state predicts.
        """
        while True:
            self._begin_next(self._slots_in(SlotState.FINISHED, only))
            self._encode_again(self._slots_in(SlotState.FULL, only))
            advancing = self._slots_in(SlotState.ADVANCING, only)
            self._finish_blocks(self._steps.find(advancing))
            waiting = self._slots_in(SlotState.NEEDS_FORWARD, only)
            committed = [slot for slot in waiting if not self._slots[slot].has_uncommitted]
            need_block = self._steps.need_block(committed)
            predicted = [slot for slot, needed in zip(committed, need_block, strict=True) if not needed]
            if predicted:
                last_rows = self.cache.last_rows[predicted][:, None]
                self._finish_blocks(self._steps.reveal(predicted, last_rows, len(self._tensors)))
            self._leave()
            if not (advancing or predicted):
                return

    def _begin_next(self, slots: list[int]) -> None:
        """Begin the blocks after finished ones, which the next call commits if the context has room for another."""
        for sequence in dict.fromkeys(self._slots[slot].sequence for slot in slots):
            sequence.block_start += self.block_tokens
        for slot in slots:
            assert not self._slots[slot].has_uncommitted, "a block is finished after the one before it is committed"
            if self.cache.lengths[slot] + self.block_tokens == self.capacity_tokens:
                self._slots[slot].state = SlotState.FULL
            else:
                self._tensors.uncommitted[slot] = self._tensors.ids[slot]
                self._slots[slot].has_uncommitted = True
                self._steps.begin(slot)

    def _finish_blocks(self, slots: list[int]) -> None:
        for slot in slots:
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
        num_given = len(sequence.ids) - sequence.block_start
        blocks = [ids[num_given:] for ids in self._tensors.ids[group].tolist()]
        best = 0
        if len(group) > 1:
            end = len(request.prompt) + request.length_tokens
            candidates = [(sequence.ids + ids)[:end] for ids in blocks]
            best = request.choose(sequence.block_start // self.block_tokens, candidates)
            self._tensors.ids[group] = self._tensors.ids[group[best]].clone()
        sequence.append(blocks[best])
        self.num_blocks += 1
        for number in group:
            self._slots[number].state = SlotState.LEAVING if sequence.stopped_by else SlotState.FINISHED

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
