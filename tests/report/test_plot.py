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
