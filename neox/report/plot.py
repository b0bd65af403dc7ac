"""Line plots as SVG, without scripts, fonts or other resources."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 14, 34  # margins
POINTS = 700  # maximum per line
COLORS = ("#1f6fb2", "#d1495b", "#3a7d44", "#8e5ea2", "#c77800", "#4a4e69")

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: name in the legend.
        points: (x, y), sorted by x.
        color: index into COLORS.
        dots: mark each point, for lines with few points.
    """

    name: str
    points: Sequence[Point]
    color: int = 0
    dots: bool = False


def thin(points: Sequence[Point], limit: int = POINTS) -> list[Point]:
    """Reduce a line to at most `limit` points without losing spikes: the lowest and highest point of each segment."""
    if len(points) <= limit:
        return list(points)
    segment = math.ceil(2 * len(points) / limit)
    reduced: list[Point] = []
    for start in range(0, len(points), segment):
        part = range(start, min(start + segment, len(points)))
        low, high = min(part, key=lambda i: points[i][1]), max(part, key=lambda i: points[i][1])
        reduced += [points[i] for i in sorted({low, high})]
    return reduced


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers between low and high."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    """Format a number for an axis."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 10 or (abs(value) >= size and size > 1e3):
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}" if abs(value) >= 1e3 else f"{value:.3g}"


def plot(title: str, lines: Sequence[Line], *, log: bool = False, x_name: str = "step") -> str:
    """Draw curves over x. Values that are not finite are omitted; with `log`, so are those not above 0.

    Returns:
        a `<figure>` element, or an empty string if there is nothing to draw.
    """

    def usable(y: float) -> bool:
        return math.isfinite(y) and (not log or y > 0)

    drawn = [
        Line(line.name, [(x, math.log10(y) if log else y) for x, y in line.points if usable(y)], line.color, line.dots)
        for line in lines
    ]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return ""
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    box = (min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, *padded(min(ys), max(ys)))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">', axes(box, log, x_name)]
    parts += [curve(line, box) for line in drawn]
    if len({line.name for line in drawn}) > 1:
        parts.append(legend(drawn))
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</svg></figure>"


def padded(low: float, high: float) -> tuple[float, float]:
    """Widen a range by a margin, also if all values are equal."""
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def to_figure(point: Point, box: tuple[float, float, float, float]) -> tuple[float, float]:
    """Convert a data point to coordinates of the figure."""
    x = LEFT + (point[0] - box[0]) / (box[1] - box[0]) * (WIDTH - LEFT - RIGHT)
    y = HEIGHT - BOTTOM - (point[1] - box[2]) / (box[3] - box[2]) * (HEIGHT - TOP - BOTTOM)
    return x, y


def axes(box: tuple[float, float, float, float], log: bool, x_name: str) -> str:
    """Draw grid, numbers and the name of the x axis."""
    parts = []
    for value in ticks(box[2], box[3]):
        y = to_figure((box[0], value), box)[1]
        parts.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label(10**value if log else value)}</text>'
        )
    for value in ticks(box[0], box[1]):
        x = to_figure((value, box[2]), box)[0]
        parts.append(f'<line class="g" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{label(value)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>')
    return "".join(parts)


def curve(line: Line, box: tuple[float, float, float, float]) -> str:
    """Draw a curve."""
    color = COLORS[line.color % len(COLORS)]
    at = [to_figure(point, box) for point in thin(line.points)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    dots = (
        "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>' for x, y in at)
        if line.dots or len(at) == 1
        else ""
    )
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.4"/>{dots}'


def legend(lines: Sequence[Line]) -> str:
    """Draw the legend at the top right."""
    parts = []
    for row, line in enumerate(lines):
        color, y = COLORS[line.color % len(COLORS)], TOP + 12 + 14 * row
        parts.append(
            f'<text x="{WIDTH - RIGHT - 6}" y="{y}" text-anchor="end" style="fill:{color}" '
            f'class="n">{escape(line.name)}</text>'
        )
    return "".join(parts)
