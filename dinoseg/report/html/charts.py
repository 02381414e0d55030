"""SVG charts that are sharp at any size and fit either theme: curves, bars and scattered points on the same axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dinoseg.report.html.page import text

Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 40  # margins of the plot
_STYLES = 4  # colours of the style sheet
_TICKS = 5
MAX = 400  # maximum points of a curve


@dataclass(frozen=True)
class Axes:
    """Ranges and names of both axes.

    Args:
        x: left and right end.
        y: lower and upper end.
        x_name: plain text.
        y_name: plain text.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    x_name: str
    y_name: str

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the drawing coordinates of a point; a point outside is moved to the edge."""
        across = _share(x, self.x) * (_WIDTH - _LEFT - _RIGHT)
        up = _share(y, self.y) * (_HEIGHT - _TOP - _BOTTOM)
        return round(_LEFT + across, 1), round(_HEIGHT - _BOTTOM - up, 1)


def around(values: Sequence[float], *, zero: bool = False) -> tuple[float, float]:
    """Return an axis range of positive length that contains all values, and 0 if `zero` is set."""
    ends = [*values, *([0.0] if zero else [])] or [0.0, 1.0]
    low, high = min(ends), max(ends)
    room = 0.05 * (high - low) or abs(high) * 0.05 or 0.5
    return (low if zero and low == 0 else low - room), high + room


def thinned(points: Points) -> Points:
    """Return a curve of at most `MAX` points: longer curves are averaged over neighbours."""
    at_once = math.ceil(len(points) / MAX) or 1
    parts = [points[start : start + at_once] for start in range(0, len(points), at_once)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def line_chart(title: str, curves: Sequence[tuple[str, Points]], axes: Axes, *, ideal: bool = False) -> str:
    """Return curves with their names; a curve of one point is a dot. `ideal` adds the diagonal."""
    drawn = [_ideal(axes)] if ideal else []
    for number, (name, points) in enumerate(curves):
        style = number % _STYLES
        places = [axes.at(*point) for point in points]
        if len(places) > 1:
            path = "M" + "L".join(f"{x} {y}" for x, y in places)
            drawn.append(f'<path class="line s{style}" d="{path}"><title>{text(name)}</title></path>')
        if len(places) <= 40:
            drawn += [
                f'<circle class="f{style}" cx="{x}" cy="{y}" r="3"><title>{_tooltip(name, point)}</title></circle>'
                for (x, y), point in zip(places, points, strict=True)
            ]
    return _chart(title, drawn, axes, [name for name, _ in curves])


def bar_chart(title: str, edges: Sequence[float], counts: Sequence[float], axes: Axes) -> str:
    """Return a histogram with one bar per count, between two edges."""
    bars = []
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        (start, top), (end, foot) = axes.at(left, count), axes.at(right, 0)
        tooltip = f"{left:.4g} to {right:.4g}: {count:.6g}"
        bars.append(
            f'<rect x="{start + 0.5:.1f}" y="{top}" width="{max(end - start - 1, 0.5):.1f}" '
            f'height="{max(foot - top, 0):.1f}"><title>{tooltip}</title></rect>'
        )
    return _chart(title, [f'<g class="bars">{"".join(bars)}</g>'], axes, [])


def scatter_chart(title: str, points: Sequence[tuple[float, float, str]], axes: Axes) -> str:
    """Return a dot for each point, with its name as tooltip, and the line of equal values."""
    dots = [_ideal(axes)]
    for x, y, name in points:
        across, down = axes.at(x, y)
        tooltip = f"<title>{_tooltip(name, (x, y))}</title>"
        dots.append(f'<circle class="f0" fill-opacity=".55" cx="{across}" cy="{down}" r="3.5">{tooltip}</circle>')
    return _chart(title, dots, axes, [])


def _chart(title: str, drawn: Sequence[str], axes: Axes, names: Sequence[str]) -> str:
    keys = "".join(
        f'<li><span class="key f{number % _STYLES}"></span>{text(name)}</li>' for number, name in enumerate(names)
    )
    legend = f'<ul class="legend">{keys}</ul>' if len(names) > 1 else ""
    return (
        f'<figure><figcaption>{text(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{text(title)}">{_frame(axes)}{"".join(drawn)}</svg>{legend}</figure>'
    )


def _frame(axes: Axes) -> str:
    """Return the grid, tick labels and names of the axes."""
    parts = []
    for value in ticks(*axes.y):
        (left, y), (right, _) = axes.at(axes.x[0], value), axes.at(axes.x[1], value)
        parts.append(f'<path class="grid" d="M{left} {y}H{right}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{_number(value)}</text>')
    for value in ticks(*axes.x):
        x, foot = axes.at(value, axes.y[0])
        parts.append(f'<path class="axis" d="M{x} {foot}v4"/>')
        parts.append(f'<text class="at" x="{x}" y="{foot + 17}" text-anchor="middle">{_number(value)}</text>')
    (left, foot), (right, top) = axes.at(axes.x[0], axes.y[0]), axes.at(axes.x[1], axes.y[1])
    parts.append(f'<path class="axis" d="M{left} {foot}H{right}"/>')
    middle = (left + right) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{text(axes.x_name)}</text>'
        f'<text class="label" x="12" y="{(foot + top) / 2}" text-anchor="middle" '
        f'transform="rotate(-90 12 {(foot + top) / 2})">{text(axes.y_name)}</text>'
    )
    return "".join(parts)


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers between two ends, inclusive."""
    rough = (high - low) / _TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _ideal(axes: Axes) -> str:
    low, high = max(axes.x[0], axes.y[0]), min(axes.x[1], axes.y[1])
    (left, foot), (right, top) = axes.at(low, low), axes.at(high, high)
    return f'<path class="ideal" d="M{left} {foot}L{right} {top}"/>'


def _share(value: float, ends: tuple[float, float]) -> float:
    return min(max((value - ends[0]) / ((ends[1] - ends[0]) or 1), 0.0), 1.0)


def _tooltip(name: str, point: tuple[float, float]) -> str:
    return f"{text(name)}: {point[0]:.5g}, {point[1]:.4g}"


def _number(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.6g}"
