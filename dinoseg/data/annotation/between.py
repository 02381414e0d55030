"""Polygons, boxes and ellipses of CVAT, and CVAT's own interpolation between two of them in a track."""

import math
from dataclasses import dataclass

import numpy as np

_CORNERS = 720  # vertices of an ellipse


@dataclass(frozen=True, slots=True)
class Outline:
    """Shape in CVAT's representation.

    Args:
        kind: `polygon`, `box` or `ellipse`.
        numbers: float64 as bytes: x, y of each corner; left, top, right, bottom; or centre x, y and the two radii.
        turned: clockwise rotation about the centre, degrees.
    """

    kind: str
    numbers: bytes
    turned: float = 0

    def points(self) -> np.ndarray:
        """Return its corners (N, 2)."""
        values = np.frombuffer(self.numbers)
        if self.kind == "polygon":
            points = values.reshape(-1, 2)
        elif self.kind == "box":
            points = values[[0, 1, 2, 1, 2, 3, 0, 3]].reshape(4, 2)
        else:
            turns = np.arange(_CORNERS) * (2 * math.pi / _CORNERS)
            points = np.stack([np.cos(turns), np.sin(turns)], axis=1) * values[2:] + values[:2]
        if not self.turned:
            return points
        cos, sin = math.cos(math.radians(self.turned)), math.sin(math.radians(self.turned))
        centre = (points.min(axis=0) + points.max(axis=0)) / 2
        return (points - centre) @ np.array([[cos, sin], [-sin, cos]]) + centre


def between(left: Outline, right: Outline, share: float) -> Outline:
    """Return a track's shape at `share`, 0 to 1, of the way between two keyframes, both of one kind.

    The numbers of boxes and ellipses are interpolated linearly, and the angle in the shorter direction. Polygon corners
    are matched by their relative position along the border, and matched corners are interpolated linearly
    (get_interpolated_shapes of CVAT's annotation.py).
    """
    starts, ends = np.frombuffer(left.numbers), np.frombuffer(right.numbers)
    if left.kind == "polygon":
        points = _between_polygons(starts.reshape(-1, 2), ends.reshape(-1, 2), share)
        return Outline("polygon", points.tobytes(), left.turned)
    angle = (right.turned - left.turned + 180) % 360 - 180
    angle = 1 if angle == -180 else angle  # as in CVAT: half a turn leaves both shapes unchanged
    return Outline(left.kind, (starts + (ends - starts) * share).tobytes(), (left.turned + angle * share) % 360)


def _between_polygons(left: np.ndarray, right: np.ndarray, share: float) -> np.ndarray:
    left, right = np.concatenate([left, left[:1]]), np.concatenate([right, right[:1]])
    matches = _matches(_along(left), _along(right))
    pairs = [(number, other) for number, others in enumerate(matches) for other in others]
    starts, ends = (points[list(which)] for points, which in zip((left, right), zip(*pairs, strict=True), strict=True))
    moved = starts + (ends - starts) * share
    first = np.cumsum([0, *map(len, matches)])  # offset of each corner's points in `moved`
    parts: list[np.ndarray] = []
    start = 0
    while start < len(matches):
        stop = start + 1
        if len(matches[start]) > 1:  # one corner becomes several
            parts += _thinned(moved[first[start] : first[stop]], right[matches[start][0] : matches[start][-1] + 1])
        else:
            while stop < len(matches) and matches[stop] == matches[start]:
                stop += 1
            parts += _thinned(moved[first[start] : first[stop]], left[start:stop])
        start = stop
    return np.stack(parts[:-1])


def _along(points: np.ndarray) -> np.ndarray:
    """Return, for each point of a line (N, 2), the share of the line's length before it."""
    lengths = np.cumsum(np.sqrt((np.diff(points, axis=0) ** 2).sum(axis=1)))
    return np.concatenate([[0], lengths / (lengths[-1] or 1)])


def _matches(left: np.ndarray, right: np.ndarray) -> list[list[int]]:
    """Return each left point's matches on the right: its nearest, and all right points that are nearest to none."""
    nearest = _nearest(left, right)
    matches = [[other] for other in nearest.tolist()]
    alone = np.setdiff1d(np.arange(len(right)), nearest)
    for other, number in zip(alone.tolist(), _nearest(right[alone], left).tolist(), strict=True):
        matches[number].append(other)
    return [sorted(others) for others in matches]


def _nearest(values: np.ndarray, line: np.ndarray) -> np.ndarray:
    """Return the position of each value's nearest neighbour in an ascending line; ties give the first."""
    above = np.searchsorted(line, values).clip(1, len(line) - 1)
    nearer = np.where(np.abs(values - line[above - 1]) <= np.abs(values - line[above]), above - 1, above)
    return np.searchsorted(line, line[nearer])


def _thinned(points: np.ndarray, border: np.ndarray) -> list[np.ndarray]:
    """Drop points that are closer to the last retained one than half the mean edge length of their border."""
    least = np.sqrt((np.diff(border, axis=0) ** 2).sum(axis=1)).sum() / (2 * len(border))
    remaining = [points[0]]
    if len(points) == 1:
        return remaining
    for point in points[1:-1]:
        if math.dist(point, remaining[-1]) >= least:
            remaining.append(point)
    remaining.append(points[-1])
    return [(points[0] + points[-1]) / 2] if len(remaining) == 2 and math.dist(*remaining) < least else remaining
