"""An HTML page from blocks: one file without external requests, in light and dark, readable on a phone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


@dataclass(frozen=True)
class Paragraph:
    """Plain text with an optional heading."""

    text: str
    heading: str = ""

    def html(self) -> str:
        """Return the block as HTML."""
        heading = f"<h2>{escape(self.heading)}</h2>" if self.heading else ""
        return f"{heading}<p>{escape(self.text)}</p>"


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
        """Return the block as HTML."""
        caption = f"<caption>{escape(self.caption)}</caption>"
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in self.rows)
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure with a caption, which is also its description for screen readers."""

    figure: Any
    caption: str

    def html(self) -> str:
        """Return the block with the figure as inline SVG."""
        buffer = io.StringIO()
        self.figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
        svg = buffer.getvalue()
        svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(self.caption)}"', 1)
        return f"<figure>{svg}<figcaption>{escape(self.caption)}</figcaption></figure>"


@dataclass(frozen=True)
class Code:
    """Preformatted text in parts (text, is_marked)."""

    caption: str
    parts: Sequence[tuple[str, bool]]

    def html(self) -> str:
        """Return the block as HTML."""
        text = "".join(f"<mark>{escape(part)}</mark>" if marked else escape(part) for part, marked in self.parts)
        return f"<figure><figcaption>{escape(self.caption)}</figcaption><pre>{text}</pre></figure>"


Block = Paragraph | Numbers | Table | Figure | Code


def page(title: str, blocks: Sequence[Block]) -> str:
    """Return the page: the title, and the blocks below it."""
    return _PAGE.format(title=escape(title), body="\n".join(block.html() for block in blocks))


def _cell(cell: str) -> str:
    is_number = cell.strip().lstrip("+-")[:1].isdigit()
    return f'<td class="number">{escape(cell)}</td>' if is_number else f"<td>{escape(cell)}</td>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{
  color-scheme: light dark; --ink: #1d2430; --paper: #fdfdfb; --soft: #5b6472; --line: #d9dce1; --mark: #fff0b8;
}}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e8ec; --paper: #15181d; --soft: #9aa3af; --line: #333942; --mark: #5a4a10; }}
}}
body {{
  font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 52rem; margin: 2.5rem auto; padding: 0 1rem;
}}
h1 {{ font-size: 1.7rem; line-height: 1.2; }} h2 {{ font-size: 1.2rem; margin-top: 2.2rem; }}
dl {{ display: flex; flex-wrap: wrap; gap: .8rem 2rem; }} dl div {{ display: flex; flex-direction: column-reverse; }}
dd {{ margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums; }}
dt, figcaption, caption {{ color: var(--soft); font-size: .88rem; }}
table {{ border-collapse: collapse; width: 100%; margin: 1.2rem 0; display: block; overflow-x: auto; }}
caption {{ text-align: left; padding-bottom: .4rem; }}
th, td {{
  text-align: left; font-size: .92rem; padding: .35rem .9rem .35rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap;
}}
.number {{ font-variant-numeric: tabular-nums; }}
figure {{ margin: 1.4rem 0; }} svg {{ width: 100%; height: auto; }}
svg text:not([style*="fill"]) {{ fill: var(--ink); }}
pre {{
  border-left: 3px solid var(--line); padding: .2rem 0 .2rem 1rem; overflow-x: auto; font-size: .85rem;
  line-height: 1.45;
}}
mark {{ background: var(--mark); color: inherit; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
