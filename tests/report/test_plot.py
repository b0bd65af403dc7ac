"""SVG plots: well formed, inside their box, spikes preserved."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from neox.report.plot import (
    BOTTOM,
    COLORS,
    HEIGHT,
    LEFT,
    POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    label,
    padded,
    plot,
    thin,
    ticks,
    to_figure,
)

CURVE = [(float(i), math.sin(i / 50) + 2) for i in range(5000)]


def coordinates(figure: str) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in re.findall(r'points="([^"]*)"', figure)[0].split()]


@pytest.mark.parametrize("log", [False, True])
def test_a_figure_is_well_formed_and_inside_its_box(log):
    figure = plot("a < b & c", [Line("one", CURVE), Line("two", [(10.0, 3.0)], 1)], log=log)
    ElementTree.fromstring(figure)
    assert "a &lt; b &amp; c" in figure
    at = coordinates(figure)
    assert 300 < len(at) <= 702
    assert all(LEFT - 0.1 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in at)
    assert at[0][0] == pytest.approx(LEFT, abs=0.1)


def test_thinning_keeps_every_spike():
    points = [(float(i), 1.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    points[77_777] = (77_777.0, -5.0)
    kept = thin(points)
    assert len(kept) <= 700 and points[54_321] in kept and points[77_777] in kept
    assert kept == sorted(kept)


def test_what_cannot_be_drawn_is_left_out():
    assert plot("x", [Line("a", [])]) == ""
    assert plot("x", [Line("a", [(1.0, float("nan"))])]) == ""
    assert plot("x", [Line("a", [(1.0, 0.0)])], log=True) == ""
    assert len(coordinates(plot("x", [Line("a", [(1.0, 2.0), (2.0, math.inf), (3.0, 4.0)])]))) == 2
    ElementTree.fromstring(plot("x", [Line("a", [(1.0, 5.0), (2.0, 5.0)])]))


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 10.0) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert all(-0.31 <= tick <= 0.72 for tick in ticks(-0.31, 0.72))
    assert ticks(3.0, 3.0) == [3.0]
    assert [label(value) for value in (0.00012, 5.0, 1500.0, 25_000.0, 3e6)] == ["0.00012", "5", "1500", "25k", "3M"]


def test_the_smallest_and_largest_values_lie_at_the_margins():
    box = (10.0, 20.0, -1.0, 3.0)
    assert to_figure((10.0, -1.0), box) == pytest.approx((LEFT, HEIGHT - BOTTOM))
    assert to_figure((20.0, 3.0), box) == pytest.approx((WIDTH - RIGHT, TOP))
    assert to_figure((15.0, 2.0), box) == pytest.approx(((LEFT + WIDTH - RIGHT) / 2, TOP + (HEIGHT - TOP - BOTTOM) / 4))


def test_numbers_of_an_axis():
    values = (999, 1000, 9999, 10_000, 999_999, 1e6, -2.5e6, 1e9, 1.5e12, 0.123456, 0.0)
    wanted = ["999", "1000", "9999", "10k", "1e+03k", "1M", "-2.5M", "1G", "1.5T", "0.123", "0"]
    assert [label(value) for value in values] == wanted
    assert ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0.0, 5.0) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert ticks(1.0, 40.0) == [10.0, 20.0, 30.0, 40.0] and ticks(0.0, 21.0) == [0.0, 5.0, 10.0, 15.0, 20.0]


def test_a_range_has_a_margin():
    assert padded(0.0, 2.0) == pytest.approx((-0.1, 2.1))
    assert padded(4.0, 4.0) == pytest.approx((3.8, 4.2))
    assert padded(0.0, 0.0) == (-1.0, 1.0)


def test_lines_of_up_to_the_limit_are_drawn_as_they_are():
    points = [(float(i), float(i % 7)) for i in range(POINTS + 1)]
    assert thin(points[:POINTS]) == points[:POINTS] and len(thin(points)) < POINTS


def test_dots_names_and_colours():
    alone = plot("x", [Line("a", [(1.0, 2.0)])])
    assert alone.count("<circle") == 1 and 'class="n"' not in alone
    line = Line("a", [(1.0, 2.0), (2.0, 3.0)], 7)
    assert "<circle" not in plot("x", [line])
    both = plot("x", [line, Line("b", line.points, 1, dots=True)])
    assert both.count("<circle") == 2 and both.count('class="n"') == 2
    assert f'stroke="{COLORS[1]}"' in both and both.count(COLORS[7 % len(COLORS)]) > 2
    assert 'class="n"' not in plot("x", [line, line])


def test_a_logarithmic_axis_shows_the_numbers_themselves():
    figure = plot("x", [Line("a", [(0.0, 0.01), (1.0, 100.0)])], log=True)
    assert {"0.01", "1", "100"} <= set(re.findall(r">([^<>]+)</text>", figure))


def test_each_segment_of_a_thinned_line_keeps_its_lowest_and_highest_point():
    """1,001 points and 700 wanted: segments of 3, of which the middle one is here neither."""
    points = [(float(i), (1.0, 5.0, 3.0)[i % 3]) for i in range(999)] + [(999.0, 7.0), (1000.0, 7.0)]
    kept = thin(points)
    assert len(kept) == 2 * 333 + 1
    assert kept[:4] == [(0.0, 1.0), (1.0, 5.0), (3.0, 1.0), (4.0, 5.0)] and kept[-1] == (999.0, 7.0)
    assert [x for x, _ in thin([(float(i), float(-i)) for i in range(30)], 10)] == [0, 5, 6, 11, 12, 17, 18, 23, 24, 29]


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 100.0, [0, 20, 40, 60, 80, 100]),
        (-3.0, 2.0, [-3, -2, -1, 0, 1, 2]),
        (0.0, 26.0, [0, 10, 20]),
        (0.0, 0.05, [0, 0.01, 0.02, 0.03, 0.04, 0.05]),
        (0.1, 0.7, [0.2, 0.4, 0.6]),
        (1000.0, 1004.0, [1000, 1001, 1002, 1003, 1004]),
        (5.0, 4.0, [5.0]),
    ],
)
def test_ticks_are_multiples_of_one_two_or_five(low, high, wanted):
    assert ticks(low, high) == pytest.approx(wanted)


def test_the_axes_stand_where_their_numbers_are():
    """The y axis has a margin of 5 %, the x axis none; numbers stand left of and below the box."""
    figure = ElementTree.fromstring(plot("title", [Line("a", [(0.0, 0.0), (10.0, 10.0)])], x_name="tokens"))
    svg = figure.find("svg")
    assert (figure.find("figcaption").text, svg.get("aria-label")) == ("title", "title")
    texts = {(text.text, text.get("text-anchor")): (text.get("x"), text.get("y")) for text in svg.iter("text")}
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    for value in (0, 2, 4, 6, 8, 10):
        x, y = texts[str(value), "middle"]
        assert float(x) == pytest.approx(LEFT + value / 10 * width, abs=0.06) and float(y) == HEIGHT - BOTTOM + 15
    for value in (0, 5, 10):
        x, y = texts[str(value), "end"]
        wanted = HEIGHT - BOTTOM - (value + 0.5) / 11 * height
        assert int(x) < LEFT and float(y) == pytest.approx(wanted + 4, abs=0.06)  # 4: half the height of a digit
    assert texts["tokens", "end"] == (str(WIDTH - RIGHT), str(HEIGHT - 4))
    lines = [[float(line.get(key)) for key in ("x1", "x2", "y1", "y2")] for line in svg.iter("line")]
    assert [line[:2] for line in lines[:3]] == [[LEFT, WIDTH - RIGHT]] * 3 and lines[0][2] == lines[0][3]
    assert [line[2:] for line in lines[3:]] == [[TOP, HEIGHT - BOTTOM]] * 6 and lines[3][:2] == [LEFT, LEFT]
    (points,) = [each.get("points").split() for each in svg.iter("polyline")]
    assert points[0] == f"{LEFT:.1f},{HEIGHT - BOTTOM - 0.5 / 11 * height:.1f}"
    assert points[1] == f"{WIDTH - RIGHT:.1f},{HEIGHT - BOTTOM - 10.5 / 11 * height:.1f}"


def test_one_point_stands_at_the_left_and_half_way_up():
    figure = plot("x", [Line("a", [(7.0, 3.0)], 1)])
    (dot,) = ElementTree.fromstring(figure).iter("circle")
    assert (float(dot.get("cx")), float(dot.get("cy"))) == (LEFT, TOP + (HEIGHT - TOP - BOTTOM) / 2)
    assert dot.get("fill") == COLORS[1]


def test_the_box_holds_every_line_and_the_legend_names_each_in_its_colour():
    lines = [Line("low", [(3.0, 1.0), (4.0, 2.0)], 2), Line("none", []), Line("<high>", [(1.0, 5.0), (8.0, 9.0)], 4)]
    svg = ElementTree.fromstring(plot("x", lines)).find("svg")
    at = [tuple(map(float, pair.split(","))) for each in svg.iter("polyline") for pair in each.get("points").split()]
    assert min(x for x, _ in at) == LEFT and max(x for x, _ in at) == WIDTH - RIGHT and at[2][0] == LEFT
    assert all(TOP < y < HEIGHT - BOTTOM for _, y in at)
    assert [each.get("stroke") for each in svg.iter("polyline")] == [COLORS[2], COLORS[4]]
    names = [text for text in svg.iter("text") if text.get("class") == "n"]
    assert [(text.text, text.get("style")) for text in names] == [
        ("low", f"fill:{COLORS[2]}"),
        ("<high>", f"fill:{COLORS[4]}"),
    ]
    assert [int(text.get("y")) for text in names] == [TOP + 12, TOP + 26]
    assert all(LEFT < int(text.get("x")) < WIDTH - RIGHT and text.get("text-anchor") == "end" for text in names)


def test_a_logarithmic_line_leaves_out_what_is_not_above_zero():
    figure = plot("x", [Line("a", [(0.0, -1.0), (1.0, 0.0), (2.0, 1e-3), (3.0, 1.0), (4.0, 1e3)])], log=True)
    at = coordinates(figure)
    assert [x for x, _ in at] == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]
    assert at[1][1] - at[0][1] == pytest.approx(at[2][1] - at[1][1], abs=0.11)


def test_a_range_of_negative_numbers_has_a_margin_below_and_above():
    assert padded(-4.0, -4.0) == pytest.approx((-4.2, -3.8)) and padded(-4.0, -2.0) == pytest.approx((-4.1, -1.9))
