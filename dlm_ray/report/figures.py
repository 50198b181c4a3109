"""Figures of reports: curves over steps, values with intervals, heat maps and parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Okabe and Ito's palette for colour-blind readers, without its yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_GREY = "#8a93a0"


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    *,
    spans: Sequence[tuple[float, float, str]] = (),
    narrow: bool = False,
) -> Any:
    """Return line plots, one per series of (x, y), each labelled at its right end.

    Args:
        series: the points of each line, by its label.
        xlabel, ylabel: the labels of the axes.
        spans: parts of the x axis as (from, to, label), which alternate in shade.
        narrow: a figure for a phone, whose labels are in a list above the axes.
    """
    figure, axes = _axes(*((4.1, 3.6) if narrow else (7.0, 3.4)))
    for number, (low, high, label) in enumerate(spans):
        axes.axvspan(low, high, color=_GREY, alpha=0.16 if number % 2 == 0 else 0.06, linewidth=0)
        place = ((low + high) / 2, 1.0)
        axes.annotate(
            label, place, xycoords=("data", "axes fraction"), xytext=(0, -11), textcoords="offset points", ha="center",
            fontsize=8,
        )  # fmt: skip
    for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
        xs, ys = zip(*points, strict=True)
        marker = "o" if len(xs) < 12 else None
        axes.plot(xs, ys, color=colour, linewidth=1.8, marker=marker, markersize=4, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if spans:  # room for their labels above the lines
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.12 * (high - low))
    if narrow:
        figure.legend(loc="upper left", frameon=False, fontsize=9, labelcolor="linecolor", borderaxespad=0.0)
        figure.subplots_adjust(left=0.15, right=0.97, top=0.97 - 0.065 * len(series), bottom=0.15)
        return figure
    figure.subplots_adjust(left=0.09, right=0.84, top=0.96, bottom=0.15)
    ends = [(name, colour, *points[-1]) for colour, (name, points) in zip(COLOURS, series.items(), strict=False)]
    low, high = axes.get_ylim()
    height = axes.bbox.height * 72 / figure.dpi  # in points, the unit of the labels' offsets
    places = [height * (y - low) / (high - low) for _, _, _, y in ends]
    for (name, colour, x, y), place, moved in zip(ends, places, _spread(places, 12.0), strict=True):
        beside = {"xytext": (6, moved - place), "textcoords": "offset points", "va": "center"}
        axes.annotate(name, (x, y), color=colour, annotation_clip=False, **beside)
    return figure


def intervals(
    rows: Sequence[tuple[str, float, float | None, float | None]],
    xlabel: str,
    *,
    zero: bool = False,
    narrow: bool = False,
) -> Any:
    """Return dots with intervals, one per (label, value, low, high), the first on top; None is no interval.

    Args:
        rows: the labels and values.
        xlabel: the label of the axis.
        zero: the values are differences: draw a line at 0, and write their signs.
        narrow: a figure for a phone, with each label above its interval.
    """
    height = 0.6 + (0.62 if narrow else 0.42) * len(rows)
    figure, axes = _axes(4.1 if narrow else 7.0, height)
    for place, (label, value, low, high) in enumerate(reversed(rows)):
        if low is not None and high is not None:
            axes.plot([low, high], [place, place], color=COLOURS[0], linewidth=2.2)
        axes.plot([value], [place], "o", color=COLOURS[0], markersize=6)
        text = f"{value:+.3f}" if zero else f"{value:.3f}"
        if narrow:
            above = {"xycoords": ("axes fraction", "data"), "xytext": (0, 9), "textcoords": "offset points"}
            axes.annotate(f"{label}: {text}", (0.0, place), fontsize=9, **above)
        else:
            axes.annotate(text, (value, place), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=9)
    axes.set_yticks(range(len(rows)), ["" if narrow else row[0] for row in reversed(rows)])
    axes.set(xlabel=xlabel, ylim=(-0.6, len(rows) - 0.3))
    if zero:
        axes.axvline(0.0, color=_GREY, linewidth=1.0, linestyle=":")
    if narrow:
        axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=_GREY, alpha=0.25)
    margins = {"left": 0.03, "right": 0.97} if narrow else {"left": 0.22, "right": 0.97}
    figure.subplots_adjust(**margins, top=0.97, bottom=0.5 / height)
    return figure


def heat_map(cells: Mapping[tuple[float, float], float], xlabel: str, ylabel: str, title: str) -> Any:
    """Return a heat map of values by (x, y), low values dark, the lowest framed; missing cells stay empty."""
    xs, ys = (sorted({place[axis] for place in cells}) for axis in (0, 1))
    low, high = min(cells.values()), max(cells.values())
    figure, axes = _axes(1.2 + 0.56 * len(xs), 1.0 + 0.34 * len(ys))
    grid = [[cells.get((x, y), float("nan")) for x in xs] for y in ys]
    axes.imshow(grid, origin="lower", aspect="auto", cmap="viridis", vmin=low, vmax=high)
    for (x, y), value in cells.items():
        # Explicit colours, which the page's text colour does not replace.
        colour = "#111111" if value > (low + high) / 2 else "#ffffff"
        place = (xs.index(x), ys.index(y))
        axes.annotate(f"{value:.3g}", place, ha="center", va="center", fontsize=7, color=colour)
        if value == low:
            axes.add_patch(_frame(place))
    axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=10)
    return figure


def parallel(names: Sequence[str], lines: Sequence[Sequence[Any]]) -> Any:
    """Return parallel coordinates: one polyline per item of `lines` over vertical axes, the lowest last value darkest.

    Numbers are placed by value within the range of their axis; other values are categories in order of appearance.
    """
    figure, axes = _axes(1.4 + 1.6 * len(names), 3.6)
    heights = []
    for x, column in enumerate(zip(*lines, strict=True)):
        positions, ticks = _axis_positions(column)
        heights.append(positions)
        for (text, _), height in zip(ticks, _spread([height for _, height in ticks], 0.05), strict=True):
            axes.annotate(text, (x, height), xytext=(4, 3), textcoords="offset points", fontsize=7)
    for points in sorted(zip(*heights, strict=True), key=lambda points: -(points[-1] or 0)):
        places = [(x, height) for x, height in enumerate(points) if height is not None]
        shade = 0.25 + 0.65 * (1 - (points[-1] or 0))
        axes.plot(*zip(*places, strict=True), color=COLOURS[0], alpha=shade, linewidth=1.5)
    for x in range(len(names)):
        axes.axvline(x, color=_GREY, linewidth=0.8)
    axes.set_xticks(range(len(names)), [name.rpartition(".")[2] for name in names])
    axes.set_yticks([])
    axes.set(xlim=(-0.1, len(names) - 0.5))
    return figure


def _axis_positions(column: Sequence[Any]) -> tuple[list[float | None], list[tuple[str, float]]]:
    """Return the heights in [0, 1] of an axis' values, and its tick labels with their heights.

    Infinite numbers and NaN have no height.
    """
    column = [None if isinstance(value, float) and not math.isfinite(value) else value for value in column]
    known = [value for value in column if value is not None]
    places: dict[Any, float]
    if known and all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        order, texts = sorted(set(known)), [f"{value:.4g}" for value in sorted(set(known))]
        places = {value: value - order[0] for value in order}
        column_keys = list(column)
    else:
        texts = list(dict.fromkeys(_category(value) for value in known))
        places = {text: float(number) for number, text in enumerate(texts)}
        column_keys = [None if value is None else _category(value) for value in column]
    span = max(places.values(), default=0.0)
    heights = {key: place / span if span else 0.5 for key, place in places.items()}
    ticks = list(zip(texts, heights.values(), strict=True))
    shown = ticks if len(ticks) <= 6 else [ticks[0], ticks[-1]]
    return [None if key is None else heights[key] for key in column_keys], shown


def _spread(places: Sequence[float], least: float) -> list[float]:
    """Return positions of labels for these places: in the same order, moved up to be at least `least` apart."""
    moved = list(places)
    order = sorted(range(len(places)), key=lambda number: places[number])
    for below, number in zip(order, order[1:], strict=False):
        moved[number] = max(moved[number], moved[below] + least)
    return moved


def _category(value: Any) -> str:
    """Return the label of a category, at most 24 characters."""
    text = " ".join(str(part) for part in value.values()) if isinstance(value, dict) else str(value)
    return text if len(text) < 24 else text[:21] + "..."


def _frame(place: tuple[int, int]) -> Any:
    """Return a border around one cell."""
    from matplotlib.patches import Rectangle

    return Rectangle((place[0] - 0.5, place[1] - 0.5), 1, 1, fill=False, edgecolor=COLOURS[1], linewidth=2.5)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure of this size in inches and its axes; text stays text in SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"
    matplotlib.rcParams["svg.hashsalt"] = "dlm_ray"
    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GREY)
    axes.tick_params(color=_GREY, labelsize=9)
    return figure, axes
