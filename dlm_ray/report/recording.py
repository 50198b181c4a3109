"""A recorded denoising: one HTML page with a slider, without external requests; or an animated GIF."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Literal

Kind = Literal["given", "settled", "new", "masked"]
MASK = "░░░ "
"""The picture of a masked token, about as long as a word."""
SUFFIXES = (".html", ".gif")

_COLUMNS = 80
_MILLISECONDS = 120
_LAST_MILLISECONDS = 2500
_COLORS = {"given": (130, 130, 130), "settled": (32, 32, 32), "new": (0, 120, 60), "masked": (185, 185, 195)}


@dataclass(frozen=True)
class Piece:
    """A part of the text in one state; a masked token has the text MASK."""

    text: str
    kind: Kind


@dataclass(frozen=True)
class Frame:
    """The text after one step, with a label such as `network call 3`."""

    label: str
    pieces: Sequence[Piece]


def save(frames: Sequence[Frame], path: Path, title: str) -> None:
    """Write frames to a file that ends with .html or .gif."""
    assert path.suffix in SUFFIXES and frames, f"{len(frames)} frames to {path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        path.write_text(html(frames, title))
    else:
        _save_gif(frames, path)


def html(frames: Sequence[Frame], title: str) -> str:
    """Return one page that shows a frame at a time, with a slider, a button and the arrow keys."""
    shown = "".join(
        f'<div class="frame" data-label="{escape(frame.label)}">'
        + "".join(f'<span class="{piece.kind}">{escape(piece.text)}</span>' for piece in frame.pieces)
        + "</div>"
        for frame in frames
    )
    return _PAGE.replace("{title}", escape(title)).replace("{last}", str(len(frames) - 1)).replace("{frames}", shown)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root { color-scheme: light dark; --given: #777; --new: #06783c; --masked: #b9b9c3; --line: #ddd; }
@media (prefers-color-scheme: dark) { :root { --given: #999; --new: #5fd394; --masked: #55555f; --line: #444; } }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.1rem; overflow-wrap: anywhere; }
nav { display: flex; gap: .75rem; align-items: center; flex-wrap: wrap; border-bottom: 1px solid var(--line);
  padding-bottom: .75rem; }
nav input { flex: 1 1 12rem; } nav button { font: inherit; min-width: 5rem; padding: .3rem; }
.frame { display: none; white-space: pre-wrap; overflow-wrap: anywhere; padding: 1rem 0; min-height: 12rem; }
.frame.shown { display: block; }
.given { color: var(--given); } .new { color: var(--new); font-weight: 700; text-decoration: underline; }
.masked { color: var(--masked); } ul { list-style: none; padding: .75rem 0 0; border-top: 1px solid var(--line); }
li { display: inline-block; margin-right: 1.5rem; }
</style></head><body>
<h1>{title}</h1>
<nav><button id="play">Play</button><input id="slider" type="range" min="0" max="{last}" value="{last}"
 aria-label="step"><output id="label"></output></nav>
{frames}
<ul><li class="given">given</li><li class="masked">░░░ masked</li><li class="new">new in this step</li>
<li>revealed before</li></ul>
<script>
const frames = document.querySelectorAll(".frame"), slider = document.getElementById("slider");
const label = document.getElementById("label"), play = document.getElementById("play");
let timer = null;
function show() {
  frames.forEach((frame, index) => frame.classList.toggle("shown", index === +slider.value));
  label.textContent = frames[slider.value].dataset.label;
}
function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; }
slider.addEventListener("input", () => { stop(); show(); });
play.addEventListener("click", () => {
  if (timer) { stop(); return; }
  if (+slider.value === +slider.max) slider.value = 0;
  play.textContent = "Stop"; show();
  timer = setInterval(() => {
    slider.value = +slider.value + 1; show();
    if (slider.value === slider.max) stop();
  }, 120);
});
show();
</script></body></html>
"""


def _save_gif(frames: Sequence[Frame], path: Path) -> None:
    """Draw frames with a font of matplotlib, which has most scripts of Latin, Greek and Cyrillic."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf"), 16)
    width, height = round(font.getlength("m")), 22
    layouts = [wrapped(frame.pieces, _COLUMNS) for frame in frames]
    num_lines = max(map(len, layouts)) + 2
    images = []
    for frame, lines in zip(frames, layouts, strict=True):
        image = Image.new("RGB", (width * (_COLUMNS + 2), height * num_lines + height // 2), "white")
        draw = ImageDraw.Draw(image)
        draw.text((width, height // 4), frame.label, font=font, fill=_COLORS["given"])
        for row, line in enumerate(lines, 2):
            column = 1
            for piece in line:
                place = (column * width, row * height - height // 2)
                draw.text(place, piece.text, font=font, fill=_COLORS[piece.kind])
                if piece.kind == "new":
                    bottom = place[1] + height - 3
                    draw.line((place[0], bottom, place[0] + width * len(piece.text), bottom), fill=_COLORS["new"])
                column += len(piece.text)
        images.append(image.quantize(32))
    durations = [_MILLISECONDS] * (len(images) - 1) + [_LAST_MILLISECONDS]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, loop=0)


def wrapped(pieces: Sequence[Piece], columns: int) -> list[list[Piece]]:
    """Return the pieces as lines of at most `columns` characters, broken at spaces where possible."""
    text = "".join(piece.text for piece in pieces)
    kinds = [piece.kind for piece in pieces for _ in piece.text]
    lines: list[list[Piece]] = []
    start = 0
    for paragraph in text.split("\n"):
        place = start
        for row in _rows(paragraph, columns):
            lines.append(_pieces(row, kinds[place : place + len(row)]))
            place += len(row)
        start += len(paragraph) + 1
    return lines


def _rows(paragraph: str, columns: int) -> list[str]:
    """Return a paragraph cut into rows, which together are the paragraph: a space at a break stays at a row's end."""
    wrapper = textwrap.TextWrapper(columns, drop_whitespace=False, expand_tabs=False, replace_whitespace=False)
    return wrapper.wrap(paragraph) or [""]


def _pieces(row: str, kinds: Sequence[Kind]) -> list[Piece]:
    """Return a row as pieces of equal kind."""
    pieces: list[Piece] = []
    for character, kind in zip(row, kinds, strict=True):
        if pieces and pieces[-1].kind == kind:
            pieces[-1] = Piece(pieces[-1].text + character, kind)
        else:
            pieces.append(Piece(character, kind))
    return pieces
