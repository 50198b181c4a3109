"""Whole canvases in slots: texts of different lengths, each at its own step, denoised by one network call a tick; they join and leave between ticks.

A text is what `whole_canvas.sample` writes with the same seed and number. A: texts in slots; L: positions of the longest; what is behind
a shorter one's end is kept apart from it, as another document of a packed row.
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
from dlm_ray.diffusion.samplers.rules import Canvas, Rule, SelectionRule
from dlm_ray.diffusion.samplers.whole_canvas import Proposals, grid_times
from dlm_ray.diffusion.visibility import Visibility


@dataclass(frozen=True, eq=False)
class CanvasRequest:
    """One text: [prompt, what is to be written, suffix]."""

    prompt: Sequence[int]
    """Ids, the start token first."""
    length_tokens: int
    suffix: Sequence[int]
    rule: Rule
    num_steps: int
    """T, for rules with times."""
    grid: str = "uniform"
    temperature: float = 1.0
    top_p: float = 1.0
    number: int = 0
    """The row that the same text is of a batch of `whole_canvas.sample`; with the seed it decides the random numbers."""
    seed: int = 0
    adjust: Adjust | None = None
    end_id: int | None = None
    """A text is finished when all up to this token is."""
    stream_canvas: bool = False
    """Whether the model's probability of every token is wanted, for people to see."""


@dataclass(eq=False)
class CanvasText:
    """A request under way, and when it is finished."""

    request: CanvasRequest
    canvas: Canvas
    """[1, L]."""
    confidence: Tensor
    """[L] float64: the model's log-probability of every token that is written, if it is shown."""
    step: int = 0
    uniform: Tensor | None = None
    """[2, 1, L] of the step."""
    num_denoising_calls: int = 0
    num_cache_calls: int = field(default=0, init=False)
    num_cached_tokens: int = field(default=0, init=False)
    stopped_by: Literal["length", "end"] | None = None

    @property
    def span(self) -> slice:
        """What is to be written."""
        return slice(len(self.request.prompt), len(self.request.prompt) + self.request.length_tokens)

    @property
    def ids(self) -> list[int]:
        """What is written for good: up to the first mask, with the end-of-text token that ends it; nothing while it may be masked again."""
        rule = self.request.rule
        if rule.remasks and self.stopped_by is None:
            return []
        is_masked = self.canvas.is_masked[0, self.span]
        count = int(is_masked.int().argmax()) if bool(is_masked.any()) else len(is_masked)
        ids = self.canvas.ids[0, self.span][:count].tolist()
        end_id = self.request.end_id
        return ids[: ids.index(end_id) + 1] if end_id in ids else ids


class CanvasSampler:
    """Slots of whole canvases; the interface of `blocks.BlockSampler`.

    Args:
        denoiser: the network.
        pattern: who sees whom.
        capacity_tokens: positions of the longest canvas.
        num_slots: texts at once.
        fixed_shapes: every call has all slots and all positions, so that a text has the same bits alone and in company.
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
        self.finished: list[CanvasText] = []
        self.num_denoising_calls = self.num_cache_calls = 0
        self._texts: list[CanvasText] = []

    @property
    def num_active(self) -> int:
        """A."""
        return len(self._texts)

    def add(self, requests: Sequence[CanvasRequest]) -> None:
        """Takes requests into free slots."""
        for request in requests:
            ids = torch.tensor([[*request.prompt, *[0] * request.length_tokens, *request.suffix]], device=self.device)
            assert ids.shape[1] <= self.capacity_tokens, (
                f"{ids.shape[1]} positions on a canvas of {self.capacity_tokens}"
            )
            is_masked = torch.zeros_like(ids, dtype=torch.bool)
            is_masked[0, len(request.prompt) : len(request.prompt) + request.length_tokens] = True
            confidence = torch.zeros(ids.shape[1], dtype=torch.float64, device=self.device)
            self._texts.append(CanvasText(request, Canvas(ids, is_masked), confidence))
        assert self.num_active <= self.num_slots, f"{self.num_active} requests in {self.num_slots} slots"

    def remove(self, request: CanvasRequest) -> None:
        """Gives back the slot of a request that nobody waits for any more; it is never in `finished`."""
        self._texts = [text for text in self._texts if text.request is not request]

    def running(self) -> Iterator[tuple[CanvasText, Tensor, Tensor, Tensor]]:
        """Every text in a slot; and ids [N], where they are masked [N] and the log-probability of the others [N] of what it is to write."""
        for text in self._texts:
            span = text.span
            yield text, text.canvas.ids[0, span], text.canvas.is_masked[0, span], text.confidence[span]

    @torch.no_grad()
    def tick(self, only: Collection[CanvasRequest] | None = None) -> None:
        """One network call over all slots in use, and a step of each.

        A tick that raises leaves every text before or behind a step, never within one: it may be repeated, with the same texts or others.

        Args:
            only: requests whose texts take part, all if None; the others stand still.
        """
        texts = [text for text in self._texts if only is None or text.request in only]
        for text in texts:
            self._look(text)
        texts = [text for text in texts if text.stopped_by is None]
        if not texts:
            return
        hidden = self._hidden(texts)
        self.num_denoising_calls += 1
        for slot, text in enumerate(texts):
            self._step(text, hidden[slot : slot + 1, : text.canvas.ids.shape[1]])

    def _look(self, text: CanvasText) -> None:
        """To the next step that needs the network, over those that want nothing."""
        rule = text.request.rule
        while not self._leaves(text):
            numbers = generator(text.request.seed, SAMPLING, text.step, text.request.number).random(
                (2, text.canvas.ids.shape[1])
            )
            text.uniform = torch.from_numpy(np.expand_dims(numbers, 1)).to(self.device)
            t, s = _times(text)
            if not isinstance(rule, SelectionRule):
                return
            now, then = (torch.tensor([time], dtype=torch.float64, device=self.device) for time in (t, s))
            if bool(rule.wanted(text.canvas, now, then, text.uniform[1]).any()):
                return
            text.canvas = rule.step(text.canvas, _nothing, t, s, text.uniform[1])  # type: ignore[arg-type]
            text.step += 1

    def _hidden(self, texts: list[CanvasText]) -> Tensor:
        """[slots, L, D] of one call."""
        lengths = [text.canvas.ids.shape[1] for text in texts]
        shape = (self.num_slots, self.capacity_tokens) if self.fixed_shapes else (len(lengths), max(lengths))
        x_t = torch.zeros(shape, dtype=torch.int64, device=self.device)
        documents = torch.full(shape, -1, dtype=torch.int32, device=self.device)
        mask_id = self.denoiser.mask_id
        for slot, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            ids = text.canvas.ids[0]
            x_t[slot, :length] = ids if mask_id is None else ids.masked_fill(text.canvas.is_masked[0], mask_id)
            documents[slot, :length] = 0
        is_padded = self.fixed_shapes or min(lengths) < max(lengths)
        return self.denoiser.hidden(x_t, Visibility(self.pattern, document_ids=documents if is_padded else None))

    def _step(self, text: CanvasText, hidden: Tensor) -> None:
        own, before = text.request, text.canvas
        assert text.uniform is not None, "the row has looked"
        proposals = Proposals(
            self.denoiser,
            before,
            Visibility(self.pattern),
            text.uniform[0].flatten(),
            own.temperature,
            own.top_p,
            own.adjust,
            "float64",
            (own.seed, text.step),
            hidden=hidden,
            stream_canvas=own.stream_canvas,
        )
        text.canvas = own.rule.step(before, proposals, *_times(text), text.uniform[1])
        if proposals.seen is not None:
            positions, log_p = proposals.seen
            text.confidence[positions] = log_p
        text.num_denoising_calls += 1
        text.step += 1
        self._leaves(text)

    def _leaves(self, text: CanvasText) -> bool:
        """Whether the text is finished; then it goes."""
        rule, num_masked = text.request.rule, int(text.canvas.is_masked.sum())
        is_last = rule.is_timed and text.step == text.request.num_steps
        if not rule.remasks and text.request.end_id is not None and text.ids[-1:] == [text.request.end_id]:
            text.stopped_by = "end"
        elif is_last or (not num_masked and not rule.remasks):
            assert not num_masked, "a rule reveals every position by time 0"
            text.stopped_by = "length"
            if text.ids[-1:] == [text.request.end_id]:
                text.stopped_by = "end"
        if text.stopped_by is None:
            return False
        self._texts.remove(text)
        self.finished.append(text)
        return True


def _times(text: CanvasText) -> tuple[float, float]:
    if not text.request.rule.is_timed:
        return 1.0, 0.0
    times = grid_times(text.request.grid, text.request.num_steps)
    return times[text.step], times[text.step + 1]


def _nothing(positions: Tensor, confidence: object) -> tuple[Tensor, None]:
    raise AssertionError("a step that wants nothing asks for nothing")
