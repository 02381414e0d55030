"""Export of masks to annotation shapes: connected parts, polygon outlines without holes, and run lengths."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

_FINE = 3  # upscaling factor: outline corners are then distinct from edge midpoints


@dataclass(frozen=True)
class MaskRegion:
    """Pixels of one class: a mask (h, w) bool whose first pixel is at (left, top) of the image."""

    value: int
    left: int
    top: int
    mask: np.ndarray

    def counts(self, height: int, width: int) -> np.ndarray:
        """Return COCO's run lengths (N,) int64, by columns of the whole image."""
        x, y = np.nonzero(self.mask.T)
        places = (x + self.left) * height + y + self.top
        first = np.concatenate([[True], np.diff(places) > 1])
        starts, ends = places[first], places[np.roll(first, -1)] + 1
        edges = np.stack([starts, ends], axis=1).ravel()
        counts = np.diff(np.concatenate([[0], edges, [height * width]]))
        return counts if counts[-1] else counts[:-1]


def parts_of(ids: np.ndarray, *, leave_out: int | None, joined: bool, min_area: int) -> Iterator[MaskRegion]:
    """Yield the parts of class ids (H, W) uint8, class by class.

    Args:
        ids: class ids of an image.
        leave_out: the class that is not an object; None: every class has parts.
        joined: all pixels of a class are one part; otherwise each 8-connected component is one.
        min_area: parts with fewer pixels are dropped.
    """
    for value in np.flatnonzero(np.bincount(ids.ravel(), minlength=256)).tolist():
        if value == leave_out:
            continue
        mask = ids == value
        if joined:
            rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
            box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            if box.sum() >= min_area:
                yield MaskRegion(value, int(columns[0]), int(rows[0]), box)
            continue
        count, labels, boxes, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
        for label in range(1, count):
            left, top, width, height, area = boxes[label].tolist()
            if area >= min_area:
                yield MaskRegion(value, left, top, labels[top : top + height, left : left + width] == label)


def edge_polygons(part: MaskRegion, tolerance: float) -> Iterator[np.ndarray]:
    """Yield polygons (N, 2) along pixel edges, as in COCO and CVAT; together they cover the part.

    Polygons have no holes: a part with holes is cut along a row through each hole. With tolerance 0 they are exact;
    otherwise corners are dropped if no edge moves by more than `tolerance` pixels (Douglas and Peucker).
    """
    for top, band in _bands(part.mask):
        fine = np.repeat(np.repeat(band, _FINE, axis=0), _FINE, axis=1)
        for outline in _outlines(fine):
            corners = (outline + 1) // _FINE  # the first or last subpixel of a pixel, never its middle one
            yield _simpler(_without_repeats(corners), tolerance) + (part.left, part.top + top)


def middle_polygons(part: MaskRegion, tolerance: float) -> Iterator[np.ndarray]:
    """Yield polygons (N, 2) through the centres of border pixels, as drawn by LabelMe; else like `edge_polygons`."""
    for top, band in _bands(part.mask):
        for outline in _outlines(band):
            points = _simpler(outline, tolerance) + (part.left, part.top + top)
            yield np.concatenate([points] * (3 if len(points) < 3 else 1))  # a polygon needs at least three points


def _bands(mask: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield first row and rows of a mask, cut along a row through each hole, so that no band has a hole."""
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
