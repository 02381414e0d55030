"""Masks as what annotation tools hold: connected parts, their outlines as polygons without holes, run lengths."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

_FINE = 3  # small pixels in a pixel's side: corners of an outline are then known from the middle of an edge


@dataclass(frozen=True)
class Part:
    """Pixels of one class: a mask (h, w) bool whose first pixel lies at (left, top) of a picture."""

    value: int
    left: int
    top: int
    mask: np.ndarray

    def counts(self, height: int, width: int) -> np.ndarray:
        """Return COCO's run lengths (N,) int64, by columns of the whole picture."""
        x, y = np.nonzero(self.mask.T)
        places = (x + self.left) * height + y + self.top
        first = np.concatenate([[True], np.diff(places) > 1])
        starts, ends = places[first], places[np.roll(first, -1)] + 1
        edges = np.stack([starts, ends], axis=1).ravel()
        counts = np.diff(np.concatenate([[0], edges, [height * width]]))
        return counts if counts[-1] else counts[:-1]


def parts_of(ids: np.ndarray, *, leave_out: int | None, joined: bool, least_area: int) -> Iterator[Part]:
    """Yield the parts of class ids (H, W) uint8, class by class.

    Args:
        ids: of a picture.
        leave_out: the class of no object; None: every class has parts.
        joined: all pixels of a class are one part, else what hangs together, by corners too, is one.
        least_area: parts of fewer pixels are left out.
    """
    for value in np.flatnonzero(np.bincount(ids.ravel(), minlength=256)).tolist():
        if value == leave_out:
            continue
        mask = ids == value
        if joined:
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            if box.sum() >= least_area:
                yield Part(value, int(columns[0]), int(rows[0]), box)
            continue
        count, labels, boxes, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
        for label in range(1, count):
            left, top, width, height, area = boxes[label].tolist()
            if area >= least_area:
                yield Part(value, left, top, labels[top : top + height, left : left + width] == label)


def edge_polygons(part: Part, tolerance: float) -> Iterator[np.ndarray]:
    """Yield polygons (N, 2) along the edges of pixels, as COCO and CVAT mean them; together they cover the part.

    A polygon has no holes: a part with holes is cut by a row through each. With a tolerance of 0 they are exact, else
    corners are left out as long as no edge moves by more pixels than that (Douglas and Peucker).
    """
    for top, band in _bands(part.mask):
        fine = np.repeat(np.repeat(band, _FINE, axis=0), _FINE, axis=1)
        for outline in _outlines(fine):
            corners = (outline + 1) // _FINE  # of the small pixels a pixel's first or last, never its middle one
            yield _simpler(_without_repeats(corners), tolerance) + (part.left, part.top + top)


def middle_polygons(part: Part, tolerance: float) -> Iterator[np.ndarray]:
    """Yield polygons (N, 2) through the middles of border pixels, as LabelMe draws them; else as `edge_polygons`."""
    for top, band in _bands(part.mask):
        for outline in _outlines(band):
            points = _simpler(outline, tolerance) + (part.left, part.top + top)
            yield np.concatenate([points] * (3 if len(points) < 3 else 1))  # a polygon has three points or more


def _bands(mask: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield first row and rows of a mask, cut by a row through each hole, so that none has a hole."""
    outlines, tree = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    holes = [outline for outline, (_, _, _, parent) in zip(outlines, tree[0], strict=True) if parent >= 0]
    boxes = [cv2.boundingRect(hole) for hole in holes]
    cuts = sorted({top + height // 2 for _, top, _, height in boxes})
    yield from ((top, mask[top:bottom]) for top, bottom in pairwise([0, *cuts, mask.shape[0]]))


def _outlines(mask: np.ndarray) -> Iterator[np.ndarray]:
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return (outline[:, 0] for outline in found)


def _without_repeats(corners: np.ndarray) -> np.ndarray:
    return corners[(corners != np.roll(corners, 1, axis=0)).any(axis=1)]


def _simpler(points: np.ndarray, tolerance: float) -> np.ndarray:
    if tolerance == 0 or len(points) < 4:
        return points
    fewer = cv2.approxPolyDP(points.astype(np.int32)[:, None], tolerance, closed=True)[:, 0]
    return fewer if len(fewer) >= 3 else points
