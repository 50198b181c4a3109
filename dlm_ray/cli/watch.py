"""A text that is denoised, step by step: live on a terminal, as lines elsewhere, and as frames to save."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.text import Text

from dlm_ray.cli.console import console, is_live, print_message
from dlm_ray.config.errors import UserError
from dlm_ray.generation.progress import TextProgress, spans
from dlm_ray.report.recording import MASK, SUFFIXES, Frame, Piece, save, wrapped

# Told apart without colour, too: bold and underline stay with NO_COLOR, and a masked token is its own picture.
_STYLES = {"given": "dim", "settled": "", "new": "bold green underline", "masked": "bright_black"}
_ASCII_MASK = "___ "
_MIN_FRAME_SECONDS = 0.05


def checked_recording_path(path: Path | None) -> Path | None:
    """Return the path of `--save`.

    Raises:
        UserError: if it does not end with .html or .gif.
    """
    if path is not None and path.suffix not in SUFFIXES:
        raise UserError.of("save", path, f"must end with {' or '.join(SUFFIXES)}")
    return path


class Watcher:
    """Shows each step of a text, and keeps the frames if they will be saved.

    Args:
        tokenizer: decodes the tokens.
        is_visible: show the steps; otherwise they are only kept.
        is_saved: keep the frames.
    """

    def __init__(self, tokenizer: Any, *, is_visible: bool, is_saved: bool):
        self._tokenizer, self.is_visible, self._is_saved = tokenizer, is_visible, is_saved
        self._prefix = self._suffix = ""
        self._live: Live | None = None
        self._num_steps = 0
        self.frames: list[Frame] = []
        self.waited_seconds = 0.0
        """Time that the display added so that steps can be seen."""

    @contextmanager
    def text(self, prefix: str = "", suffix: str = "") -> Iterator[None]:
        """Watch one text within the context.

        Args:
            prefix, suffix: the given text before and after.
        """
        self._prefix, self._suffix = prefix, suffix
        self._num_steps, self.waited_seconds = 0, 0.0
        self.frames.clear()
        if not (self.is_visible and is_live()):
            yield
            return
        with Live(console=console, auto_refresh=False, transient=True) as self._live:
            yield
        self._live = None

    def on_text(self, progress: TextProgress) -> None:
        """Show one step: the option `on_text` of `sample`, `infill` and `chat`."""
        self._num_steps += 1
        num_masked = sum(progress.is_masked)
        label = f"step {self._num_steps}" + (f", {num_masked} masked" if num_masked else "")
        frame = Frame(label, self._pieces(progress))
        if self._is_saved:
            self.frames.append(frame)
        if self._live is not None:
            self._live.update(live_text(frame, console.width, console.height), refresh=True)
            time.sleep(_MIN_FRAME_SECONDS)
            self.waited_seconds += _MIN_FRAME_SECONDS
        elif self.is_visible:
            print_message(plain_text(frame, is_ascii=not console.encoding.startswith("utf")))

    def _pieces(self, progress: TextProgress) -> list[Piece]:
        """Return the whole text as pieces."""
        pieces = [Piece(self._prefix, "given")] if self._prefix else []
        for span in spans(self._tokenizer, progress):
            pieces.append(
                Piece(MASK, "masked") if span.is_masked else Piece(span.text, "new" if span.is_new else "settled")
            )
        return [*pieces, Piece(self._suffix, "given")] if self._suffix else pieces

    def save(self, path: Path, title: str) -> None:
        """Write the frames of the last text to an HTML page or a GIF."""
        if self.frames:
            save(self.frames, path, title)
            print_message(f"recorded {len(self.frames)} steps to {path}")


def live_text(frame: Frame, columns: int, lines: int) -> Text:
    """Return a frame for a terminal; of a text that is too long for it, the end."""
    rows = wrapped(frame.pieces, columns)
    shown = Text(end="").append(frame.label + "\n", style="bold")
    for row in rows[-max(1, lines - 2) :]:
        for piece in row:
            shown.append(piece.text, style=_STYLES[piece.kind])
        shown.append("\n")
    return shown


def plain_text(frame: Frame, *, is_ascii: bool = False) -> str:
    """Return a frame without styles: new tokens are in [brackets], masked tokens are boxes or ___."""
    return f"{frame.label}: " + "".join(_plain(piece, is_ascii) for piece in frame.pieces)


def _plain(piece: Piece, is_ascii: bool) -> str:
    if piece.kind == "masked":
        return _ASCII_MASK if is_ascii else MASK
    return f"[{piece.text}]" if piece.kind == "new" else piece.text
