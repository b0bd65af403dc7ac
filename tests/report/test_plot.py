"""SVG plots: well formed, inside their box, spikes preserved."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from neox.report.plot import HEIGHT, LEFT, WIDTH, Line, label, plot, thin, ticks

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
