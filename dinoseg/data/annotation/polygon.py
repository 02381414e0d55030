"""Rasterisation of polygons and LabelMe's other figures, each by the rule of its own tool."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

FARTHEST = 1_000_000  # pixels from the origin: beyond it, Pillow draws in the wrong place
_MAX_POINTS = 2**23  # border steps of a polygon: a few with erratic borders would exhaust memory
_FIFTHS = 5  # pycocotools samples borders in steps of a fifth of a pixel
LINE_WIDTH, POINT_RADIUS = 10, 5  # pixels, as LabelMe draws them


def border_length(points: np.ndarray) -> int:
    """Return the length of a polygon's (N, 2) border, in steps of a fifth of a pixel."""
    steps = np.abs(points - np.concatenate([points[1:], points[:1]])).max(axis=1)
    return int(_FIFTHS * steps.sum()) + 2 * len(points)


def check_polygon(points: np.ndarray) -> None:
    """Raise a ValueError if a polygon (N, 2) cannot be rasterised.

    Raises:
        ValueError: it has fewer than three points, or its points or border length exceed the limits.
    """
    if len(points) < 3:
        raise ValueError(f"its polygon has {len(points)} points and needs at least 3")
    if not (np.abs(points) <= FARTHEST).all():  # also false for NaN
        raise ValueError(f"its polygon has a point that is more than {FARTHEST} pixels away, or not a number")
    if border_length(points) > _MAX_POINTS:
        raise ValueError("its border is too long: it crosses the image many times, or extends far beyond it")


def filled(points: np.ndarray, size: tuple[int, int]) -> tuple[int, np.ndarray]:
    """Fill a polygon (N, 2) exactly as pycocotools does: return the first column and a mask (H, columns) bool.

    The border is sampled in fifths of a pixel. Each crossing of a column's centre toggles between inside and outside
    (rleFrPoly of maskApi.c).
    """
    height, width = size
    along, down = _border(np.trunc(_FIFTHS * points + 0.5).astype(np.int64))  # C's cast truncates towards zero
    moves = np.flatnonzero(along[1:] != along[:-1]) + 1
    column = (np.minimum(along[moves], along[moves - 1]) + 0.5) / _FIFTHS - 0.5
    row = (np.minimum(down[moves], down[moves - 1]) + 0.5) / _FIFTHS - 0.5
    inside = (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    columns = column[inside].astype(np.int64)
    rows = np.ceil(row[inside].clip(0, height)).astype(np.int64)
    if not columns.size:
        return 0, np.zeros((height, 0), bool)
    first, count = int(columns.min()), int(columns.max() - columns.min()) + 1
    changes = np.sort((columns - first) * height + rows)  # column-major positions of the toggles
    runs = np.diff(changes, prepend=0, append=max(count * height, changes[-1]))
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)[: count * height]
    return first, inside.reshape(count, height).T


def _border(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of every step along the border of a polygon (N, 2) int64; each edge includes both ends."""
    ends = np.roll(corners, -1, axis=0)
    moved = (corners != ends).any(axis=1)
    starts, ends = corners[moved], ends[moved]
    across, down = np.abs(ends - starts).T
    flat = across >= down  # edges sampled by column; the others by row
    if not len(starts):
        return np.zeros(1, np.int64), np.zeros(1, np.int64)
    longer = np.where(flat, across, down)
    main = np.where(flat[:, None], starts, starts[:, ::-1]), np.where(flat[:, None], ends, ends[:, ::-1])
    back = main[0][:, 0] > main[1][:, 0]
    low, high = np.where(back[:, None], main[1], main[0]), np.where(back[:, None], main[0], main[1])
    slope = (high[:, 1] - low[:, 1]) / longer
    edge = np.repeat(np.arange(len(starts)), longer + 1)
    step = np.arange(edge.size) - np.repeat(np.cumsum(longer + 1) - longer - 1, longer + 1)
    step = np.where(back[edge], longer[edge] - step, step)
    walked = step + low[edge, 0]
    other = np.trunc(low[edge, 1] + slope[edge] * step + 0.5).astype(np.int64)
    return np.where(flat[edge], walked, other), np.where(flat[edge], other, walked)


def figure(kind: str, points: Sequence[tuple[float, float]], size: tuple[int, int]) -> np.ndarray:
    """Draw a figure of LabelMe as LabelMe does, by Pillow and with its outline: return a mask (H, W) bool.

    Args:
        kind: `polygon`, `rectangle` (two corners), `oriented_rectangle` (four), `circle` (its centre and a point on
            it), `line`, `linestrip` (10 pixels wide), `joined` (a linestrip with round corners) or `point` (a disc of
            radius 5).
        points: points of the figure, as (x, y).
        size: (H, W) of the image.
    """
    canvas = Image.new("1", (size[1], size[0]))
    pen = ImageDraw.Draw(canvas)
    if kind in ("polygon", "oriented_rectangle"):
        pen.polygon(points, outline=1, fill=1)
    elif kind == "rectangle":
        (left, top), (right, bottom) = points
        pen.rectangle((min(left, right), min(top, bottom), max(left, right), max(top, bottom)), outline=1, fill=1)
    elif kind in ("line", "linestrip", "joined"):
        pen.line(points, fill=1, width=LINE_WIDTH, joint="curve" if kind == "joined" else None)
    else:
        x, y = points[0]
        radius = POINT_RADIUS if kind == "point" else math.dist(points[0], points[1])
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=1, fill=1)
    return np.asarray(canvas)
