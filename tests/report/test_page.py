"""A page stands alone, escapes what it is given, and its figures are text that can be read aloud."""

import re

from dlm_ray.report import Code, Figure, Numbers, Paragraph, Table, curves, intervals, page


def whole():
    return page(
        "A <b>title</b>",
        [
            Paragraph("One & two", "Heading"),
            Numbers([("1.5", "bits")]),
            Table("caption", ["name", "value"], [["<script>", "-0.25"]]),
            Figure(curves({"one": [(0, 3.0), (1, 2.0)], "two": [(0, 4.0), (1, 1.0)]}, "step", "loss"), "two curves"),
            Figure(intervals([("first", 1.0, 0.9, 1.1), ("second", 2.0, 1.5, 2.5)], "bits"), "two intervals"),
            Code("text", [("before ", False), ("<mark me>", True)]),
        ],
    )


def test_a_page_requests_nothing_from_other_hosts():
    outside = re.findall(r"""(?:src|href)=["']([^#"'][^"']*)|url\((?!#)([^)]*)""", whole())
    assert outside == []
    assert "<script" not in whole().replace("&lt;script", "")


def test_text_is_escaped_everywhere_in_a_page():
    text = whole()
    assert "A &lt;b&gt;title&lt;/b&gt;" in text and "One &amp; two" in text and "<mark>&lt;mark me&gt;</mark>" in text


def test_figures_are_described_and_their_words_are_text():
    text = whole()
    assert 'aria-label="two curves"' in text and 'aria-label="two intervals"' in text
    for word in ("step", "loss", "first", "second"):
        assert re.search(rf"<text[^>]*>{word}</text>", text), word


def test_the_same_blocks_give_the_same_page():
    assert whole() == whole()


def test_a_value_without_an_interval_is_drawn_as_a_dot_only():
    figure = intervals([("one document", 1.0, None, None), ("many", 2.0, 1.5, 2.5)], "bits")
    bars = [line for line in figure.axes[0].lines if line.get_linestyle() == "-" and line.get_marker() == "None"]
    assert len(bars) == 1 and len(figure.axes[0].lines) == 3


def test_overlapping_labels_are_moved_apart_in_order():
    figure = curves(
        {"worse": [(0, 1.0), (1, 0.502)], "best": [(0, 1.0), (1, 0.5)], "far": [(0, 1.0), (1, 0.9)]}, "x", "y"
    )
    figure.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in figure.axes[0].texts}
    assert boxes["best"].y1 <= boxes["worse"].y0 and boxes["worse"].y1 <= boxes["far"].y0
