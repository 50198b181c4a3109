"""Samples whole canvases in slots: sequences of different lengths and steps share one network call per tick.

Sequences join and leave between ticks. The output equals that of `whole_canvas.sample` with the same seed and number.
A: slots in use; L: positions of the longest canvas. Padding after a shorter canvas is masked from it, like another
document of a packed sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dlm_ray.diffusion.denoiser import Denoiser
from dlm_ray.diffusion.draws import SAMPLING, generator
from dlm_ray.diffusion.samplers.adjust import Adjust
from dlm_ray.diffusion.samplers.rules import Canvas, Propose, Rule, SelectionRule
from dlm_ray.diffusion.samplers.whole_canvas import Proposals, grid_times
from dlm_ray.diffusion.visibility import Visibility


@dataclass(frozen=True, eq=False)
class CanvasRequest:
    """A request for one sequence: [prompt, generated tokens, suffix]."""

    prompt: Sequence[int]
    """Token ids, the start token first."""
    length_tokens: int
    """Number of tokens to generate."""
    suffix: Sequence[int]
    """Token ids after the generated tokens."""
    rule: Rule
    """Selects the positions that a step reveals."""
    num_steps: int
    """T, the number of steps, for rules with times."""
    grid: str = "uniform"
    temperature: float = 1.0
    top_p: float = 1.0
    number: int = 0
    """Determines the random numbers, together with the seed: the sequence's row in a batch of `whole_canvas.sample`."""
    seed: int = 0
    adjust: Adjust | None = None
    end_id: int | None = None
    """Id of the end token; a sequence is finished when it is revealed up to this token."""
    stream_canvas: bool = False
    """Whether to compute the model's log-probability of every token, for display."""


@dataclass(eq=False)
class CanvasState:
    """The state of a request, running or finished."""

    request: CanvasRequest
    canvas: Canvas
    """The canvas [1, L], from prompt to suffix."""
    confidence: Tensor
    """[L] float64: the model's log-probability of every revealed token, if the request streams its canvas."""
    step: int = 0
    uniform: Tensor | None = None
    """[2, 1, L] random numbers of the current step, for tokens and for positions."""
    num_denoising_calls: int = 0
    num_cache_calls: int = field(default=0, init=False)
    num_cached_tokens: int = field(default=0, init=False)
    stopped_by: Literal["length", "end"] | None = None

    @property
    def span(self) -> slice:
        """The positions to generate."""
        return slice(len(self.request.prompt), len(self.request.prompt) + self.request.length_tokens)

    @property
    def ids(self) -> list[int]:
        """The final generated ids: those before the first mask, up to and including the end token.

        Empty while revealed tokens may be masked again.
        """
        rule = self.request.rule
        if rule.remasks and self.stopped_by is None:
            return []
        is_masked = self.canvas.is_masked[0, self.span]
        count = int(is_masked.int().argmax()) if bool(is_masked.any()) else len(is_masked)
        ids = self.canvas.ids[0, self.span][:count].tolist()
        end_id = self.request.end_id
        return ids[: ids.index(end_id) + 1] if end_id in ids else ids


class CanvasSampler:
    """Samples whole canvases in slots, with the interface of `blocks.BlockSampler`.

    Args:
        denoiser: the network.
        pattern: which positions attend to which.
        capacity_tokens: maximum number of positions of a canvas.
        num_slots: maximum number of requests at once.
        device: device of the network.
        fixed_shapes: every call has all slots and all positions, so that a sequence has the same bits whether it is
            sampled with or without others.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        pattern: Literal["causal", "bidirectional"],
        *,
        capacity_tokens: int,
        num_slots: int,
        device: torch.device,
        fixed_shapes: bool = False,
    ):
        self.denoiser, self.pattern, self.device = denoiser, pattern, device
        self.capacity_tokens, self.num_slots, self.fixed_shapes = capacity_tokens, num_slots, fixed_shapes
        self.finished: list[CanvasState] = []
        self.num_denoising_calls = self.num_cache_calls = 0
        self._sequences: list[CanvasState] = []

    @property
    def num_active(self) -> int:
        """A, the number of slots in use."""
        return len(self._sequences)

    def add(self, requests: Sequence[CanvasRequest]) -> None:
        """Put requests into free slots."""
        for request in requests:
            ids = torch.tensor([[*request.prompt, *[0] * request.length_tokens, *request.suffix]], device=self.device)
            assert ids.shape[1] <= self.capacity_tokens, (
                f"{ids.shape[1]} positions on a canvas of {self.capacity_tokens}"
            )
            is_masked = torch.zeros_like(ids, dtype=torch.bool)
            is_masked[0, len(request.prompt) : len(request.prompt) + request.length_tokens] = True
            confidence = torch.zeros(ids.shape[1], dtype=torch.float64, device=self.device)
            self._sequences.append(CanvasState(request, Canvas(ids, is_masked), confidence))
        assert self.num_active <= self.num_slots, f"{self.num_active} requests in {self.num_slots} slots"

    def remove(self, request: CanvasRequest) -> None:
        """Free the slot of a cancelled request, which will not be in `finished`."""
        self._sequences = [sequence for sequence in self._sequences if sequence.request is not request]

    def running(self) -> Iterator[tuple[CanvasState, Tensor, Tensor, Tensor]]:
        """Iterate over the sequences in slots.

        Yields:
            The sequence; and for its N positions to generate the ids [N], where they are masked [N], and the
            log-probability [N] of the rest.
        """
        for sequence in self._sequences:
            span = sequence.span
            yield sequence, sequence.canvas.ids[0, span], sequence.canvas.is_masked[0, span], sequence.confidence[span]

    @torch.no_grad()
    def tick(self, only: Collection[CanvasRequest] | None = None) -> None:
        """Call the network once over all slots in use, and take one step of each.

        A tick that raises leaves every sequence before or after a step, never within one. It may be repeated, with the
        same requests or others.

        Args:
            only: the requests that take part, all if None; the others do not advance.
        """
        sequences = [sequence for sequence in self._sequences if only is None or sequence.request in only]
        for sequence in sequences:
            self._advance(sequence)
        sequences = [sequence for sequence in sequences if sequence.stopped_by is None]
        if not sequences:
            return
        hidden = self._hidden(sequences)
        self.num_denoising_calls += 1
        for slot, sequence in enumerate(sequences):
            self._step(sequence, hidden[slot : slot + 1, : sequence.canvas.ids.shape[1]])

    def _advance(self, sequence: CanvasState) -> None:
        """Move a sequence to its next step that needs the network, over steps that want no proposals."""
        rule = sequence.request.rule
        while not self._leave_if_finished(sequence):
            numbers = generator(sequence.request.seed, SAMPLING, sequence.step, sequence.request.number).random(
                (2, sequence.canvas.ids.shape[1])
            )
            sequence.uniform = torch.from_numpy(np.expand_dims(numbers, 1)).to(self.device)
            t, s = _times(sequence)
            if not isinstance(rule, SelectionRule):
                return
            now, then = (torch.tensor([time], dtype=torch.float64, device=self.device) for time in (t, s))
            if bool(rule.wanted(sequence.canvas, now, then, sequence.uniform[1]).any()):
                return
            refuse: Propose = _refuse_proposals  # type: ignore[assignment]
            sequence.canvas = rule.step(sequence.canvas, refuse, t, s, sequence.uniform[1])
            sequence.step += 1

    def _hidden(self, sequences: list[CanvasState]) -> Tensor:
        """Return the hidden states [slots, L, D] of one call."""
        lengths = [sequence.canvas.ids.shape[1] for sequence in sequences]
        shape = (self.num_slots, self.capacity_tokens) if self.fixed_shapes else (len(lengths), max(lengths))
        x_t = torch.zeros(shape, dtype=torch.int64, device=self.device)
        documents = torch.full(shape, -1, dtype=torch.int32, device=self.device)
        mask_id = self.denoiser.mask_id
        for slot, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
            ids = sequence.canvas.ids[0]
            x_t[slot, :length] = ids if mask_id is None else ids.masked_fill(sequence.canvas.is_masked[0], mask_id)
            documents[slot, :length] = 0
        is_padded = self.fixed_shapes or min(lengths) < max(lengths)
        return self.denoiser.hidden(x_t, Visibility(self.pattern, document_ids=documents if is_padded else None))

    def _step(self, sequence: CanvasState, hidden: Tensor) -> None:
        request, before = sequence.request, sequence.canvas
        assert sequence.uniform is not None, "`_advance` has set the random numbers"
        proposals = Proposals(
            self.denoiser,
            before,
            Visibility(self.pattern),
            sequence.uniform[0].flatten(),
            request.temperature,
            request.top_p,
            request.adjust,
            "float64",
            (request.seed, sequence.step),
            hidden=hidden,
            stream_canvas=request.stream_canvas,
        )
        sequence.canvas = request.rule.step(before, proposals, *_times(sequence), sequence.uniform[1])
        if proposals.last_log_p is not None:
            positions, log_p = proposals.last_log_p
            sequence.confidence[positions] = log_p
        sequence.num_denoising_calls += 1
        sequence.step += 1
        self._leave_if_finished(sequence)

    def _leave_if_finished(self, sequence: CanvasState) -> bool:
        """Return whether a sequence is finished; a finished one leaves its slot."""
        rule, num_masked = sequence.request.rule, int(sequence.canvas.is_masked.sum())
        is_last = rule.is_timed and sequence.step == sequence.request.num_steps
        if not rule.remasks and sequence.request.end_id is not None and sequence.ids[-1:] == [sequence.request.end_id]:
            sequence.stopped_by = "end"
        elif is_last or (not num_masked and not rule.remasks):
            assert not num_masked, "a rule reveals every position by time 0"
            sequence.stopped_by = "length"
            if sequence.ids[-1:] == [sequence.request.end_id]:
                sequence.stopped_by = "end"
        if sequence.stopped_by is None:
            return False
        self._sequences.remove(sequence)
        self.finished.append(sequence)
        return True


def _times(sequence: CanvasState) -> tuple[float, float]:
    if not sequence.request.rule.is_timed:
        return 1.0, 0.0
    times = grid_times(sequence.request.grid, sequence.request.num_steps)
    return times[sequence.step], times[sequence.step + 1]


def _refuse_proposals(positions: Tensor, confidence: object) -> tuple[Tensor, None]:
    raise AssertionError("a step without wanted positions makes no proposals")
