"""The state of a text while it is generated, for streaming and for display."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dlm_ray.diffusion.samplers.blocks import BlockSampler
from dlm_ray.diffusion.samplers.requests import Request
from dlm_ray.diffusion.samplers.rules import Canvas


@dataclass(frozen=True)
class TextProgress:
    """The first text of a batch after a step."""

    ids: list[int]
    """Generated tokens so far, without the prompt; arbitrary where masked."""
    is_masked: list[bool]
    """Which of them are masked."""
    num_settled: int
    """Number of tokens at the beginning that no later step changes."""
    is_new: list[bool]
    """Which of them this step has revealed."""


class ProgressTracker:
    """Makes a TextProgress of each step; it knows the previous one.

    Args:
        start: position of the first generated token.
        length: most tokens to generate.
    """

    def __init__(self, start: int, length: int):
        self._start, self._length = start, length
        self._previous: list[bool] = []
        """Which positions the previous step left masked."""

    def of_canvas(self, canvas: Canvas, *, can_remask: bool) -> TextProgress:
        """Return the first text of a whole canvas."""
        open_part = slice(self._start, self._start + self._length)
        is_masked = canvas.is_masked[0, open_part].tolist()
        num_revealed = next((index for index, masked in enumerate(is_masked) if masked), len(is_masked))
        return self._progress(canvas.ids[0, open_part].tolist(), is_masked, 0 if can_remask else num_revealed)

    def with_step(
        self, on_step: Callable[[int, int, Canvas], None] | None, on_text: Callable[[TextProgress], None], remasks: bool
    ) -> Callable[[int, int, Canvas], None]:
        """Return a callback for each step of a whole canvas that calls both."""

        def callback(step: int, steps: int, canvas: Canvas) -> None:
            if on_step is not None:
                on_step(step, steps, canvas)
            on_text(self.of_canvas(canvas, can_remask=remasks))

        return callback

    def of_blocks(self, sampler: BlockSampler, request: Request) -> TextProgress:
        """Return the text of a request: its finished blocks, and the current one."""
        for output in sampler.finished:
            if output.request is request:
                return self._progress(output.ids, [False] * len(output.ids), len(output.ids))
        sequence, block_ids, block_masked, _ = next(item for item in sampler.running() if item[0].request is request)
        finished = sequence.ids[self._start :]
        num_given = len(sequence.ids) - sequence.block_start  # of the block: the end of the prompt, or all of it
        ids = [*finished, *block_ids[num_given:].tolist()]
        is_masked = [*[False] * len(finished), *block_masked[num_given:].tolist()]
        return self._progress(ids[: self._length], is_masked[: self._length], min(len(finished), self._length))

    def _progress(self, ids: list[int], is_masked: list[bool], num_settled: int) -> TextProgress:
        before = [*self._previous, *[True] * (len(ids) - len(self._previous))]
        is_new = [was and not masked for was, masked in zip(before, is_masked, strict=False)]
        self._previous = is_masked
        return TextProgress(ids, is_masked, num_settled, is_new)


@dataclass(frozen=True)
class Span:
    """A part of a text for display: revealed text, or one masked token."""

    text: str
    is_masked: bool = False
    is_new: bool = False


def spans(tokenizer: Any, progress: TextProgress) -> list[Span]:
    """Return a text as spans of equal state; a masked token is a span with an empty text.

    The spans of adjacent revealed tokens are cut out of their common text, because a character may need several tokens.
    """
    result: list[Span] = []
    run: list[int] = []
    """The revealed tokens since the last masked one."""
    shown = 0
    for index, (token, masked) in enumerate(zip(progress.ids, progress.is_masked, strict=True)):
        if masked:
            result.append(Span("", is_masked=True))
            run, shown = [], 0
            continue
        run.append(token)
        is_end = index + 1 == len(progress.ids) or progress.is_masked[index + 1]
        if is_end or progress.is_new[index + 1] != progress.is_new[index]:
            text = tokenizer.decode(run)
            if not is_end:
                text = text.rstrip("\ufffd")  # the next token completes the character
            if text[shown:]:
                result.append(Span(text[shown:], is_new=progress.is_new[index]))
            shown = len(text)
    return result


def settled_text(tokenizer: Any, progress: TextProgress, end_id: int) -> str:
    """Return the text that no later step changes, up to the end-of-text token and without an incomplete character."""
    ids: Sequence[int] = progress.ids[: progress.num_settled]
    if end_id in ids:
        ids = ids[: ids.index(end_id)]
    text: str = tokenizer.decode(ids)
    return text.rstrip("\ufffd")
