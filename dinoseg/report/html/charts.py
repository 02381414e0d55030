"""Coordinates of SVG charts (curves, bars and dots on common axes), which `macros.html.jinja` draws in either theme."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 40  # margins of the plot
_TICKS = 5
MAX = 400  # maximum points of a curve
_MAX_DOTS = 40  # points up to which a curve has a dot for each


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
        across = _share(x, self.x) * (WIDTH - _LEFT - _RIGHT)
        up = _share(y, self.y) * (HEIGHT - _TOP - _BOTTOM)
        return round(_LEFT + across, 1), round(HEIGHT - _BOTTOM - up, 1)


def range_around(values: Sequence[float], *, zero: bool = False) -> tuple[float, float]:
    """Return an axis range of positive length that contains all values, and 0 if `zero` is set."""
    ends = [*values, *([0.0] if zero else [])] or [0.0, 1.0]
    low, high = min(ends), max(ends)
    room = 0.05 * (high - low) or abs(high) * 0.05 or 0.5
    return (low if zero and low == 0 else low - room), high + room


def thin(points: Points) -> Points:
    """Return a curve of at most `MAX` points: longer curves are averaged over neighbours."""
    at_once = math.ceil(len(points) / MAX) or 1
    parts = [points[start : start + at_once] for start in range(0, len(points), at_once)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def line_chart(
    title: str,
    curves: Sequence[tuple[str, Points]],
    axes: Axes,
    *,
    ideal: bool = False,
    colors: Sequence[Sequence[int]] = (),
) -> dict[str, Any]:
    """Return a chart of named curves; a curve of one point is a dot. `ideal` adds the diagonal.

    Args:
        title: of the chart.
        curves: name and points of each.
        axes: of the chart.
        ideal: add the diagonal.
        colors: of the curves (R, G, B); empty: those of the page.
    """
    drawn: list[dict[str, Any]] = []
    for number, (name, points) in enumerate(curves):
        dots = [(*axes.at(x, y), f"{name}: {x:.5g}, {y:.4g}") for x, y in points]
        path = "L".join(f"{x} {y}" for x, y, _ in dots) if len(dots) > 1 else ""
        color = tuple(colors[number]) if colors else None
        drawn.append({"name": name, "path": path, "dots": dots if len(dots) <= _MAX_DOTS else [], "color": color})
    return _chart(title, axes, ideal) | {"curves": drawn}


def bar_chart(title: str, edges: Sequence[float], counts: Sequence[float], axes: Axes) -> dict[str, Any]:
    """Return a histogram with one bar per count, between two edges."""
    bars = []
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        (start, top), (end, foot) = axes.at(left, count), axes.at(right, 0)
        label = f"{left:.4g} to {right:.4g}: {count:.6g}"
        bars.append(
            {"x": start + 0.5, "y": top, "width": max(end - start - 1, 0.5), "height": foot - top, "label": label}
        )
    return _chart(title, axes) | {"bars": bars}


def scatter_chart(title: str, points: Sequence[tuple[float, float, str]], axes: Axes) -> dict[str, Any]:
    """Return a chart with a dot for each point, whose name is its tooltip, and the line of equal values."""
    dots = [(*axes.at(x, y), f"{name}: {x:.5g}, {y:.4g}") for x, y, name in points]
    return _chart(title, axes, ideal=True) | {"dots": dots}


def _chart(title: str, axes: Axes, ideal: bool = False) -> dict[str, Any]:
    """Return the title, the frame and, for `ideal`, the diagonal of a chart."""
    low, high = max(axes.x[0], axes.y[0]), min(axes.x[1], axes.y[1])
    return {
        "title": title,
        "axes": axes,
        "size": (WIDTH, HEIGHT),
        "corners": (*axes.at(axes.x[0], axes.y[0]), *axes.at(axes.x[1], axes.y[1])),
        "x_ticks": [(axes.at(value, axes.y[0])[0], _format_tick(value)) for value in ticks(*axes.x)],
        "y_ticks": [(axes.at(axes.x[0], value)[1], _format_tick(value)) for value in ticks(*axes.y)],
        "ideal": (*axes.at(low, low), *axes.at(high, high)) if ideal else None,
        "curves": [],
        "bars": [],
        "dots": [],
    }


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers between two ends, inclusive."""
    rough = (high - low) / _TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _share(value: float, ends: tuple[float, float]) -> float:
    return min(max((value - ends[0]) / ((ends[1] - ends[0]) or 1), 0.0), 1.0)


def _format_tick(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.6g}"
