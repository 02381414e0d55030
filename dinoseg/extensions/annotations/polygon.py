"""Rasterisation of polygons and LabelMe's other figures, each by the rule of its own tool."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

FARTHEST = 1_000_000  # pixels from the origin: beyond it, Pillow draws in the wrong place
MAX_RADIUS = 2**18  # pixels: Pillow takes a minute for a circle of twice that, whose squares overflow
_MAX_POINTS = 2**23  # border steps of a polygon: a few with erratic borders would exhaust memory
_CHUNK = 1024  # edges whose crossings are computed at once: bounds the memory by the width of the image
_FIFTHS = 5  # pycocotools samples borders in steps of a fifth of a pixel
LINE_WIDTH, POINT_RADIUS = 10, 5  # pixels, as LabelMe draws them


class Patch(NamedTuple):
    """Pixels of a shape in a box of its image.

    Attributes:
        top: first row of the box.
        left: its first column.
        mask: (h, w) bool; the box lies inside the image.
    """

    top: int
    left: int
    mask: np.ndarray

    def view(self, canvas: np.ndarray) -> np.ndarray:
        """Return the box (h, w) of a canvas (H, W), which shares its memory."""
        height, width = self.mask.shape
        return canvas[self.top : self.top + height, self.left : self.left + width]


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


def rasterise(points: np.ndarray, size: tuple[int, int]) -> Patch:
    """Fill a polygon (N, 2) exactly as pycocotools does.

    The border is sampled in fifths of a pixel. Each crossing of a column's centre toggles between inside and outside
    (rleFrPoly of maskApi.c). Only crossings of the image's own columns are computed, however far the border extends.
    """
    height, width = size
    corners = np.trunc(_FIFTHS * points + 0.5).astype(np.int64)  # C's cast truncates towards zero
    ends = np.roll(corners, -1, axis=0)
    chunks = range(0, len(corners), _CHUNK)
    parts = [_crossings(corners[at : at + _CHUNK], ends[at : at + _CHUNK], width) for at in chunks]
    columns, lowest = (np.concatenate(part) for part in zip(*parts, strict=True))
    if not columns.size:
        return Patch(0, 0, np.zeros((0, 0), bool))
    rows = np.ceil(((lowest + 0.5) / _FIFTHS - 0.5).clip(0, height)).astype(np.int64)
    left = int(columns.min())
    top = int(rows.min())
    count = int(columns.max()) - left + 1
    length = int(rows.max()) - top
    # column-major positions of the toggles, of which each column has an even number
    changes = np.sort((columns - left) * length + rows - top)
    runs = np.diff(changes, prepend=0, append=count * length)
    inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return Patch(top, left, inside.reshape(count, length).T)


def _crossings(starts: np.ndarray, ends: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where edges between two points (N, 2) int64, in fifths, cross the centres of columns 0 to width - 1.

    An edge is a chain of samples, one for each step along its longer axis. It crosses the centre of column c between
    two samples at 5 c + 2 and 5 c + 3.

    Returns:
        Columns (M,) int64, and the lesser y (M,) int64 of the two samples.
    """
    left = np.minimum(starts[:, 0], ends[:, 0])
    right = np.maximum(starts[:, 0], ends[:, 0])
    first = np.maximum(-((2 - left) // _FIFTHS), 0)  # the least c with 5 c + 2 >= left
    last = np.minimum((right - 3) // _FIFTHS, width - 1)
    counts = np.maximum(last - first + 1, 0)
    edge = np.repeat(np.arange(len(starts)), counts)
    column = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    before = _FIFTHS * column + _FIFTHS // 2  # x of the sample on the left of the centre
    starts = starts[edge]
    ends = ends[edge]
    across, down = np.abs(ends - starts).T
    flat = across >= down  # edges sampled by column; the others by row
    axis = np.where(flat, 0, 1)
    each = np.arange(len(edge))
    back = (starts[each, axis] > ends[each, axis])[:, None]
    low = np.where(back, ends, starts)
    high = np.where(back, starts, ends)
    longer = np.maximum(np.where(flat, across, down), 1)
    slope = (high[each, 1 - axis] - low[each, 1 - axis]) / longer
    offset = low[each, 1 - axis]

    def sample(step: np.ndarray) -> np.ndarray:
        """Return the other coordinate after some steps along the longer axis, rounded as in C."""
        return np.trunc(offset + slope * step + 0.5).astype(np.int64)

    step = before - low[:, 0]
    of_flat = np.minimum(sample(step), sample(step + 1))
    # the last step before a steep edge crosses: a division gives it up to rounding, so that a few candidates are tried
    guess = np.floor((before + 0.5 - offset) / np.where(slope == 0, 1, slope)).astype(np.int64) - 2
    rising = slope > 0
    behind = [np.where(rising, sample(guess + more) <= before, sample(guess + more) > before) for more in range(5)]
    of_steep = low[:, 1] + guess + np.sum(behind, axis=0) - 1
    return column, np.where(flat, of_flat, of_steep)


def draw_figure(kind: str, points: Sequence[tuple[float, float]], size: tuple[int, int]) -> Patch:
    """Draw a figure of LabelMe as LabelMe does, by Pillow and with its outline.

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
    left, top, right, bottom = canvas.getbbox() or (0, 0, 0, 0)
    return Patch(top, left, np.asarray(canvas.crop((left, top, right, bottom))))
