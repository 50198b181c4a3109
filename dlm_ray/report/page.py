"""An HTML page from blocks: one file without external requests, in light and dark, readable on a phone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Paragraph:
    """Plain text with an optional heading."""

    text: str
    heading: str = ""

    def html(self) -> str:
        """Return the block as HTML."""
        heading = f"<h2>{escape(self.heading)}</h2>" if self.heading else ""
        return f"{heading}<p>{escape(self.text)}</p>" if self.text else heading


@dataclass(frozen=True)
class Numbers:
    """A few key numbers as (value, label)."""

    items: Sequence[tuple[str, str]]

    def html(self) -> str:
        """Return the block as HTML."""
        return (
            "<dl>"
            + "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for value, label in self.items)
            + "</dl>"
        )


@dataclass(frozen=True)
class Table:
    """A table of text cells; numbers get tabular figures."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        """Return the block as HTML; a wide table scrolls sideways, and its caption does not."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in self.rows)
        return (
            f'<figure><figcaption>{escape(self.caption)}</figcaption><div class="scroll"><table>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></figure>"
        )


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure with a caption, which is also its description for screen readers."""

    figure: Any
    caption: str
    narrow: Any = None
    """The figure that a phone shows; None shows the wide one there, which scrolls sideways."""

    def html(self) -> str:
        """Return the block with the figure, or both figures, as inline SVG."""
        if self.narrow is None:
            drawn = f'<div class="scroll">{self._svg(self.figure, "only")}</div>'
        else:
            drawn = self._svg(self.figure, "wide") + self._svg(self.narrow, "narrow")
        return f"<figure>{drawn}<figcaption>{escape(self.caption)}</figcaption></figure>"

    def _svg(self, figure: Any, kind: str) -> str:
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
        svg = buffer.getvalue()
        described = f'<svg class="{kind}" role="img" aria-label="{escape(self.caption)}"'
        return svg[svg.index("<svg") :].replace("<svg", described, 1)


@dataclass(frozen=True)
class Code:
    """Preformatted text in parts (text, is_marked)."""

    caption: str
    parts: Sequence[tuple[str, bool]]

    def html(self) -> str:
        """Return the block as HTML."""
        text = "".join(f"<mark>{escape(part)}</mark>" if marked else escape(part) for part, marked in self.parts)
        return f"<figure><figcaption>{escape(self.caption)}</figcaption><pre>{text}</pre></figure>"


@dataclass(frozen=True)
class Answers:
    """One prompt, and what several models wrote after it, side by side."""

    prompt: str
    answers: Sequence[tuple[str, str, str]]
    """For each model (name, text, note)."""

    def html(self) -> str:
        """Return the block as HTML; on a phone the answers stand below each other."""
        cards = "".join(
            f"<div><h4>{escape(name)}</h4><p>{escape(text)}</p><small>{escape(note)}</small></div>"
            for name, text, note in self.answers
        )
        return f'<section class="answers"><h3>{escape(self.prompt)}</h3><div class="cards">{cards}</div></section>'


@dataclass(frozen=True)
class Denoising:
    """A text that was denoised step by step, with a slider over the steps."""

    caption: str
    prompt: str
    tokens: Sequence[str]
    """The text of each token."""
    steps: Sequence[int]
    """For each token the step at which it was known, from 1."""

    def html(self) -> str:
        """Return the block as HTML; without JavaScript it shows the finished text."""
        last = max(self.steps, default=0)
        text = "".join(
            f'<span data-step="{step}">{escape(token)}</span>'
            for token, step in zip(self.tokens, self.steps, strict=True)
        )
        return (
            f'<figure class="denoising"><figcaption>{escape(self.caption)}</figcaption>'
            f'<p class="prompt">{escape(self.prompt)}</p><p class="text" aria-live="off">{text}</p>'
            f'<div class="controls" hidden><button type="button">Play</button>'
            f'<input type="range" min="0" max="{last}" value="{last}" aria-label="denoising step">'
            f"<output></output></div></figure>"
        )


Block = Paragraph | Numbers | Table | Figure | Code | Answers | Denoising


def page(title: str, blocks: Sequence[Block]) -> str:
    """Return the page: the title, and the blocks below it."""
    style = resources.files(__package__).joinpath("page.css").read_text()
    body = "\n".join(block.html() for block in blocks)
    script = ""
    if any(isinstance(block, Denoising) for block in blocks):
        script = f"<script>\n{resources.files(__package__).joinpath('denoising.js').read_text()}</script>\n"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n{script}</body>\n</html>\n"
    )


def _cell(cell: str) -> str:
    is_number = cell.strip().lstrip("+-")[:1].isdigit()
    return f'<td class="number">{escape(cell)}</td>' if is_number else f"<td>{escape(cell)}</td>"
