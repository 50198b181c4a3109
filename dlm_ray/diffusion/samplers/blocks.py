"""Block by block over a KV cache: finished blocks are read from the cache, and one network call serves all texts, each in its own block and step.

A block's keys and values are those of its clean tokens: when a block is finished, one call over it writes them (BD3-LM, arXiv 2503.09573, section 3.1).
What the last committed row predicts already (with shift: a block's first position) is drawn without a call. So with shift, blocks of one token
are autoregressive decoding with a KV cache. K: positions of a block; A: slots in use, always the first ones; the state lies on the host, and
what crosses to the device in a call is its tokens and what it wants, and back come tokens and confidence.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm_ray.diffusion.denoiser import Denoiser
from dlm_ray.diffusion.samplers.adjust import Adjust
from dlm_ray.diffusion.samplers.drawing import nothing_allowed
from dlm_ray.diffusion.samplers.encoder import Encoder
from dlm_ray.diffusion.samplers.requests import GenerationOutput, Request, SamplingParams, SequenceState
from dlm_ray.diffusion.samplers.rules import Canvas, SelectionRule
from dlm_ray.diffusion.samplers.slots import Slot, SlotState, by_params, draw_by_params, num_steps, times, window
from dlm_ray.diffusion.visibility import Visibility


@dataclass(frozen=True)
class GenerationBatch:
    """Finished requests, in the order in which they were asked for, and what the batch cost."""

    texts: list[GenerationOutput]
    num_denoising_calls: int
    """Network calls that denoised somebody's block; they may have committed others'."""
    num_cache_calls: int
    """Network calls that only filled the cache: prompts, finished blocks, and text that was encoded again."""


class BlockSampler:
    """Slots that denoise and commit blocks; `add` requests, `tick` until they are in `finished`.

    Args:
        denoiser: a network that sees in blocks of `block_tokens`, or an autoregressive one and blocks of 1.
        rule: what a step reveals.
        block_tokens: K. Blocks begin at multiples of it, whatever the prompt.
        capacity_tokens: positions that the network sees, a multiple of K, of two blocks at least. A text that goes beyond is encoded again
            from a start token and its last half context, as rows of training begin (BD3-LM slides a window, section 6.2).
        num_slots: requests at once; candidates count.
        num_steps: T of a block, for rules with times.
        grid: as in `whole_canvas.sample`.
        temperature, top_p: as in `drawing.draw_tokens`.
        adjust: its rows are the numbers of requests, its positions count from the start token.
        fixed_shapes: every call has all slots, all rows of logits and as many keys, so that a text has the same bits alone and in company.
        prefix_bytes: of memory for what prompts begin with, which later requests begin with, too; 0 keeps nothing.
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
        assert capacity_tokens % block_tokens == 0 and capacity_tokens >= 2 * block_tokens, (
            f"{capacity_tokens} positions in blocks"
        )
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
        # The row that predicts each position of a block, among [last committed row ; the block's own rows].
        self._row_of = denoiser.rows_for(torch.arange(block_tokens, 2 * block_tokens)) - block_tokens + 1  # [K]
        assert bool((self._row_of >= 0).all()), "a position is predicted from its block, or from the row before it"
        self._slots: list[Slot] = []  # those in use
        shape = (num_slots, block_tokens)
        self._ids = torch.zeros(shape, dtype=torch.int64)
        self._is_masked, self._is_open, self._wanted, self._again = (
            torch.zeros(shape, dtype=torch.bool) for _ in range(4)
        )
        self._step = torch.zeros(num_slots, dtype=torch.int64)
        self._confidence = torch.zeros(shape, dtype=torch.float64)
        width = window(self.params, block_tokens)
        self._numbers = torch.zeros(
            num_slots, width, 2, block_tokens, dtype=torch.float64
        )  # for tokens, and for positions

    @property
    def num_active(self) -> int:
        """A."""
        return len(self._slots)

    @property
    def num_cache_calls(self) -> int:
        """Network calls that only filled the cache."""
        return self._encoder.num_calls + self._num_committing_calls

    def add(self, requests: Sequence[Request]) -> None:
        """Takes requests into free slots and encodes the whole blocks of their prompts; takes none of them if that raises."""
        first = self.num_active
        try:
            self._add(first, requests)
        except BaseException:
            for slot in range(first, min(self.num_active, len(self._ids))):
                self.cache.release(slot)
            del self._slots[first:]
            raise

    def _add(self, first: int, requests: Sequence[Request]) -> None:
        for request in requests:
            assert 0 < len(request.prompt) < self.capacity_tokens, "a prompt has a start token and leaves room"
            text = SequenceState(request, list(request.prompt))
            for candidate in range(request.candidates):
                self._slots.append(Slot(text, candidate, request.random(0, candidate), request.params or self.params))
        assert self.num_active <= len(self._ids), f"{self.num_active} requests in {len(self._ids)} slots"
        slots = range(first, self.num_active)
        more = max(window(self._slots[slot].params, self.block_tokens) for slot in slots) - self._numbers.shape[1]
        if more > 0:
            self._numbers = torch.nn.functional.pad(self._numbers, (0, 0, 0, 0, 0, more))
        whole = [len(self._slots[slot].text.ids) // self.block_tokens * self.block_tokens for slot in slots]
        self._encode(
            first,
            [self._slots[slot].text.ids[:length] for slot, length in zip(slots, whole, strict=True)],
            are_prompts=True,
        )
        for slot, length in zip(slots, whole, strict=True):
            self._slots[slot].text.num_encoded = length
            self._begin(slot)

    def remove(self, request: Request) -> None:
        """Gives back the slots of a request that nobody waits for any more; it is never in `finished`."""
        for slot in self._slots:
            if slot.text.request is request:
                slot.state = SlotState.LEAVING
        self._leave()

    def running(self) -> Iterator[tuple[SequenceState, Tensor, Tensor, Tensor]]:
        """Every text in a slot; and of the block it is at, ids [K], where they are masked [K] and the log-probability of the others [K]."""
        for number, slot in enumerate(self._slots):
            if slot.candidate == 0:
                yield slot.text, self._ids[number], self._is_masked[number], self._confidence[number]

    def tick(self, only: Collection[Request] | None = None) -> None:
        """One network call over all slots in use: each denoises its block or commits it.

        A tick that raises leaves every slot before or behind a step, never within one: it may be repeated, with the same texts or others.

        Args:
            only: requests whose texts take part, all if None; the others stand still, and the network sees nothing of their blocks.
        """
        self._encode_again(self._waiting_for(SlotState.FULL, only))
        self._look(only)
        asking, committing = (
            self._waiting_for(state, only) for state in (SlotState.NEEDS_FORWARD, SlotState.COMMITTING)
        )
        if not (asking or committing):
            return
        num = len(self._ids) if self.fixed_shapes else self.num_active
        mask_id = self.denoiser.mask_id
        assert mask_id is not None or not asking, (
            "without a mask token, every position is predicted by the row before it"
        )
        x_t = self._ids[:num] if mask_id is None else self._ids[:num].masked_fill(self._is_masked[:num], mask_id)
        if only is not None:
            still = torch.ones(num, dtype=torch.bool)
            still[asking + committing] = False
            x_t = x_t.masked_fill(still[:, None], 0)
        hidden = self.denoiser.hidden(x_t.to(self.cache.last_rows.device), self._visibility, self.cache)  # [A, K, D]
        if asking:
            texts = dict.fromkeys(self._slots[slot].text for slot in asking)
            rows = torch.cat([self.cache.last_rows[:num, None], hidden], 1)  # [A, 1 + K, D]
            self._reveal(asking, rows if len(asking) == num else rows[asking], num * self.block_tokens)
            self.num_denoising_calls += 1
            for text in texts:
                text.num_denoising_calls += 1
        else:
            self._num_committing_calls += 1
        for text in dict.fromkeys(self._slots[slot].text for slot in committing):
            text.num_encoded += self.block_tokens
            text.num_cache_calls += 1
        for slot in committing:
            self.cache.commit(slot, self.block_tokens, hidden[slot, -1])
            if self.cache.lengths[slot] == self.capacity_tokens:
                self._slots[slot].state = SlotState.FULL
                self.cache.release(slot)  # whatever becomes of the next call, others' blocks fit behind an empty slot
            else:
                self._begin(slot)
        self._encode_again([slot for slot in committing if self._slots[slot].state is SlotState.FULL])
        self._leave()

    def _waiting_for(self, state: SlotState, only: Collection[Request] | None) -> list[int]:
        """Slots in a state, of requests that take part."""
        return [
            i for i, own in enumerate(self._slots) if own.state is state and (only is None or own.text.request in only)
        ]

    def _begin(self, slot: int) -> None:
        """Masks the block behind what is committed, but for what the prompt gives of it."""
        text = self._slots[slot].text
        given = text.ids[text.num_encoded :]
        self._ids[slot, : len(given)] = torch.tensor(given, dtype=torch.int64)
        self._is_masked[slot] = self._is_open[slot] = torch.arange(self.block_tokens) >= len(given)
        self._slots[slot].state = SlotState.ADVANCING
        self._again[slot] = False
        self._confidence[slot] = 0.0
        self._step[slot] = 0
        self._slots[slot].random = text.request.random(
            text.num_encoded // self.block_tokens, self._slots[slot].candidate
        )
        self._refill(slot)

    def _refill(self, slot: int) -> None:
        own = self._slots[slot]
        width = window(own.params, self.block_tokens)
        self._numbers[slot, :width] = torch.from_numpy(own.random.random((width, 2, self.block_tokens)))

    def _encode(self, first: int, rows: list[list[int]], *, are_prompts: bool) -> None:
        """Whole blocks of clean text into the empty slots from `first` on."""
        for slot, cost in zip(
            self._slots[first:], self._encoder.encode(first, rows, are_prompts=are_prompts), strict=False
        ):
            if slot.candidate == 0:
                slot.text.num_cache_calls += cost.num_calls
                slot.text.num_cached_tokens += cost.num_cached_tokens

    def _encode_again(self, full: list[int]) -> None:
        """Half the context in the place of all of it; the keys of what stays are made without those of what goes."""
        keep = max(self.block_tokens, self.capacity_tokens // 2 // self.block_tokens * self.block_tokens)
        while full:
            count = next((n for n in range(1, len(full)) if full[n] != full[0] + n), len(full))  # slots side by side
            for slot in full[:count]:
                self.cache.release(slot)
            texts = [self._slots[slot].text for slot in full[:count]]
            rows = [[text.ids[0], *text.ids[text.num_encoded - keep + 1 : text.num_encoded]] for text in texts]
            self._encode(full[0], rows, are_prompts=False)
            for slot in full[:count]:
                self._begin(slot)
            full = full[count:]

    def _look(self, only: Collection[Request] | None) -> None:
        """Takes every slot to its next network call: over steps that want nothing, and over what the last committed row predicts."""
        while True:
            looking = self._waiting_for(SlotState.ADVANCING, only)
            for params, places in by_params([self._slots[slot] for slot in looking]):
                self._find_step(params, [looking[place] for place in places])
            asking = self._waiting_for(SlotState.NEEDS_FORWARD, only)
            asks_network = (self._wanted[asking] & (self._row_of > 0)).any(1).tolist()
            free = [slot for slot, asks in zip(asking, asks_network, strict=True) if not asks]
            if free:
                self._reveal(free, self.cache.last_rows[free][:, None], len(self._ids))
            self._leave()
            if not (looking or free):
                return

    def _find_step(self, params: SamplingParams, slots: list[int]) -> None:
        """Moves each slot to its next step that wants something; the canvas is the same up to it, so a window of steps is one batch."""
        index, rule, width = torch.tensor(slots), params.rule, window(params, self.block_tokens)
        last = num_steps(params, self.block_tokens)
        now = self._step[index]  # [S]
        if not rule.is_timed:  # every step of such a rule wants something
            self._wanted[index] = rule.wanted(self._canvas(index), *times(params, now), self._numbers[index, now, 1])
            for slot in slots:
                self._slots[slot].state = SlotState.NEEDS_FORWARD
            return
        steps = (now - now % width)[:, None] + torch.arange(width)  # [S, W]
        is_next = (steps >= now[:, None]) & (steps < last)
        t, s = times(params, steps.flatten())
        uniform = self._numbers[index[:, None], steps % width, 1].flatten(0, 1)  # [S * W, K]
        canvas = self._canvas(index.repeat_interleave(width))
        shape = (*steps.shape, self.block_tokens)
        wanted = rule.wanted(canvas, t, s, uniform).view(shape) & is_next[:, :, None]
        again = (
            rule.remasked(canvas, t, s, uniform).view(shape) & is_next[:, :, None] if rule.remasks else wanted & False
        )
        acts = (wanted | again).any(-1)
        is_found, at = acts.any(1), acts.int().argmax(1)
        rows = torch.arange(len(slots))
        self._wanted[index], self._again[index] = wanted[rows, at], again[rows, at]
        self._move(params, slots, torch.where(is_found, steps[rows, at], steps[:, -1] + 1))
        wants = wanted[rows, at].any(-1)
        for slot, found, asks in zip(slots, is_found.tolist(), wants.tolist(), strict=True):
            if asks:
                self._slots[slot].state = SlotState.NEEDS_FORWARD
            elif found:  # masks again, and asks for nothing
                self._is_masked[slot] |= self._again[slot]
                self._move(params, [slot], self._step[slot : slot + 1] + 1)
            elif self._step[slot] >= last:
                self._finish_block(slot)

    def _move(self, params: SamplingParams, slots: list[int], step: Tensor) -> None:
        """To a step [S] within the window of random numbers, or to the first of the next."""
        before, self._step[slots] = self._step[slots], step
        if params.rule.is_timed:
            is_next = (
                (step != before)
                & (step % window(params, self.block_tokens) == 0)
                & (step < num_steps(params, self.block_tokens))
            )
            for place in is_next.nonzero()[:, 0].tolist():
                self._refill(slots[place])

    def _canvas(self, index: Tensor) -> Canvas:
        return Canvas(self._ids[index], self._is_masked[index], self._is_open[index])

    def _reveal(self, slots: list[int], rows: Tensor, fixed_rows: int) -> None:
        """One step of some slots: proposals where they want them, and the rule's choice among them.

        Args:
            slots: S of them.
            rows: [S, 1 or 1 + K, D]: the last committed row, and the block's own if they are wanted.
            fixed_rows: so many rows of logits with fixed shapes.
        """
        index, step = torch.tensor(slots), self._step[slots]
        ways = by_params([self._slots[slot] for slot in slots])
        wanted = self._wanted[index]  # [S, K]
        which, position = wanted.nonzero(as_tuple=True)  # [n]
        width = torch.tensor([window(self._slots[slot].params, self.block_tokens) for slot in slots])
        proposed, ranked, log_p = self._propose(
            rows.flatten(0, 1)[(which * rows.shape[1] + self._row_of[position]).to(rows.device)],
            self._numbers[index[which], (step % width)[which], 0, position],
            [self._slots[slots[number]] for number in which.tolist()]
            if self.adjust is not None or len(ways) > 1
            else [],
            ways[0][0],
            position,
            fixed_rows,
        )
        canvas = self._canvas(index)
        confidence = torch.full(wanted.shape, float("-inf"), dtype=torch.float64)
        confidence[wanted] = ranked
        tokens, shown = torch.zeros_like(canvas.ids), torch.zeros_like(confidence)
        tokens[wanted], shown[wanted] = proposed, log_p
        chosen, is_over = torch.zeros_like(wanted), torch.ones(len(slots), dtype=torch.bool)
        for params, places in ways:
            part = Canvas(canvas.ids[places], canvas.is_masked[places], canvas.is_open[places])
            chosen[places] = params.rule.chosen(part, wanted[places], confidence[places], *times(params, step[places]))
            if params.rule.remasks:
                is_over[places] = step[places] + 1 >= num_steps(params, self.block_tokens)
        # From here on nothing can go wrong: a slot is never left within a step.
        for params, places in ways:
            self._move(params, [slots[place] for place in places], step[places] + 1)
        self._ids[index] = torch.where(chosen, tokens, canvas.ids)
        self._confidence[index] = torch.where(chosen, shown, self._confidence[index])
        is_masked = (canvas.is_masked & ~chosen) | self._again[index]
        self._is_masked[index] = is_masked
        for slot, finished in zip(slots, (~is_masked.any(1) & is_over).tolist(), strict=True):
            self._slots[slot].state = SlotState.ADVANCING
            if finished:
                self._finish_block(slot)

    def _propose(
        self,
        rows: Tensor,
        uniform: Tensor,
        slots: list[Slot],
        params: SamplingParams,
        position: Tensor,
        fixed_rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, confidence and (where it is shown) log-probability [n] each, on the host.

        They are drawn from hidden rows [n, D] on the device, of `slots` [n] or all of one `way`.
        """
        device, adjust, num_rows = rows.device, self.adjust, len(rows)
        ways = list(dict.fromkeys(slot.params for slot in slots)) or [params]
        number = torch.tensor(
            [ways.index(slot.params) for slot in slots] if len(ways) > 1 else [0] * num_rows, device=device
        )
        arguments = [uniform.to(device), number]
        if adjust is not None:
            absolute = position + torch.tensor([slot.text.num_encoded for slot in slots])
            arguments += [
                torch.tensor([slot.text.request.number for slot in slots], device=device),
                absolute.to(device),
            ]
        if self.fixed_shapes:  # rows of nobody, of no way
            missing = (0, fixed_rows - num_rows)
            rows = torch.nn.functional.pad(rows, (0, 0, *missing))
            arguments = [torch.nn.functional.pad(one, missing, value=-1) for one in arguments]

        def draw(logits: Tensor, uniform: Tensor, number: Tensor, *places: Tensor) -> Tensor:
            if adjust is not None:
                logits = adjust(logits, *places)
            return draw_by_params(logits, uniform, number, ways)

        tokens, confidence, log_p = self.denoiser.reduce_logits(rows, draw, *arguments)[:num_rows].cpu().unbind(1)
        if bool((tokens < 0).any()):
            raise ValueError(nothing_allowed(None if adjust is None else int(absolute[tokens < 0][0])))
        return tokens.long(), confidence, log_p

    def _finish_block(self, slot: int) -> None:
        """Adds a clean block to its text, once all candidates for it are clean: then one is kept, by all of them."""
        self._slots[slot].state = SlotState.CLEAN
        text = self._slots[slot].text
        group = (
            [slot] if text.request.candidates == 1 else [i for i, other in enumerate(self._slots) if other.text is text]
        )
        if any(self._slots[i].state is not SlotState.CLEAN for i in group):
            return
        given = len(text.ids) - text.num_encoded
        written = [ids[given:] for ids in self._ids[group].tolist()]
        best = 0
        if len(group) > 1:
            end = len(text.request.prompt) + text.request.length_tokens
            candidates = [(text.ids + ids)[:end] for ids in written]
            best = text.request.choose(text.num_encoded // self.block_tokens, candidates)
            self._ids[group] = self._ids[group[best]].clone()
        text.take(written[best])
        self.num_blocks += 1
        for i in group:
            self._slots[i].state = SlotState.LEAVING if text.stopped_by else SlotState.COMMITTING

    def _leave(self) -> None:
        """Finished requests go, and the last slot in use takes the place of each."""
        for slot in [i for i, state in enumerate(self._slots) if state.state is SlotState.LEAVING][::-1]:
            text = self._slots[slot].text
            if self._slots[slot].candidate == 0 and text.stopped_by is not None:
                self.finished.append(text.written())
            last = self.num_active - 1
            if slot != last:
                self.cache.fork(last, slot)
                own = (
                    self._ids,
                    self._is_masked,
                    self._is_open,
                    self._wanted,
                    self._again,
                    self._confidence,
                    self._step,
                    self._numbers,
                )
                for tensor in own:
                    tensor[slot] = tensor[last]
            self._slots[slot] = self._slots[last]
            self._slots.pop()
            self.cache.release(last)


@torch.no_grad()
def write(
    denoiser: Denoiser,
    requests: Sequence[Request],
    rule: SelectionRule,
    *,
    block_tokens: int,
    context_tokens: int,
    on_step: Callable[[int, int, Canvas], None] | None = None,
    **options: object,
) -> GenerationBatch:
    """Writes all requests in one batch.

    Args:
        denoiser, rule, block_tokens, options: of `BlockSampler`.
        context_tokens: positions that the network sees, a multiple of K; the cache has room for no more than the longest request needs.
        requests: of different prompts and lengths as they come.
        on_step: called after each call with (blocks done, blocks, canvas of the blocks in progress); a text that stops early has fewer.
    """
    ends = [len(request.prompt) + request.length_tokens for request in requests]
    sampler = BlockSampler(
        denoiser,
        rule,
        block_tokens=block_tokens,
        capacity_tokens=min(context_tokens, block_tokens * max(2, *(-(-end // block_tokens) for end in ends))),
        num_slots=sum(request.candidates for request in requests),
        **options,  # type: ignore[arg-type]
    )
    sampler.add(requests)
    num_blocks = sum(
        -(-end // block_tokens) - len(own.prompt) // block_tokens for own, end in zip(requests, ends, strict=True)
    )
    while sampler.num_active:
        sampler.tick()
        if on_step is not None:
            on_step(sampler.num_blocks, num_blocks, sampler._canvas(torch.arange(sampler.num_active)))
    by_request = {id(written.request): written for written in sampler.finished}
    texts = [by_request[id(request)] for request in requests]
    return GenerationBatch(texts, sampler.num_denoising_calls, sampler.num_cache_calls)
