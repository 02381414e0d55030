"""Boundaries of all classes at once: surface dice, Boundary IoU, and errors by distance from them; no torch."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import groupby

import cv2
import numpy as np

DISTANCES = (1, 2, 4, 8, 16)  # upper ends of the bands in pixels; one more band holds all farther pixels
_BAND_ROWS = 1024  # rows per chunk of `boundary_errors`, to limit the memory for huge images
_CV2_DTYPES = (np.uint8, np.uint16, np.int16, np.float32, np.float64)


def neighbour_edges(ids: np.ndarray, known: np.ndarray | None = None) -> np.ndarray:
    """Return where (H, W) a pixel differs from one of its four neighbours in the image.

    The surface dice adds the image border to these, see `_edges`. DAVIS's boundary is another one by definition: a mask
    pixel or a neighbour of it, see `region_boundary`.

    Args:
        ids: (H, W).
        known: (H, W) bool, pixels that are compared at all; None: all.
    """
    edges = np.zeros(ids.shape, bool)
    for one, other in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differ = ids[one] != ids[other]
        if known is not None:
            differ &= known[one] & known[other]
        edges[one] |= differ
        edges[other] |= differ
    return edges


def surface_dices(
    reference: np.ndarray, prediction: np.ndarray, classes: Sequence[int], tolerance: float
) -> np.ndarray:
    """Return for each class the share of boundary pixels within `tolerance` of the other map's boundary, (K,) float64.

    A boundary pixel of a class shares an edge with a pixel outside it or with the image border. Boundaries are counted
    in pixels (A. Reinke et al., 2021, as in MONAI), not in arc length. The share is 1 if both maps lack the class, and
    0 if only one does.

    Args:
        reference: (H, W) ids.
        prediction: (H, W) ids.
        classes: ids to compare.
        tolerance: Euclidean distance in pixels, inclusive.
    """
    near, pixels = surface_counts(reference, prediction, classes, tolerance).T
    return np.divide(near, pixels, out=np.ones(len(pixels)), where=pixels > 0)


def surface_counts(
    reference: np.ndarray, prediction: np.ndarray, classes: Sequence[int], tolerance: float
) -> np.ndarray:
    """Return for each class the number of boundary pixels near the other map's boundary, and of all boundary pixels.

    The quotient is the surface dice; of counts summed over images, it is the pooled surface dice. Distances are
    compared as integer squares, so a distance of exactly `tolerance` counts. The cost is proportional to the classes'
    bounding boxes and to the tolerance.

    Args:
        reference: (H, W) ids.
        prediction: (H, W) ids.
        classes: ids to compare.
        tolerance: Euclidean distance in pixels, inclusive.

    Returns:
        (K, 2) int64; 0 and 0 where both maps lack the class.
    """
    check_sizes(reference, prediction)
    reaches = _reaches(tolerance, reference.shape)
    counts = np.zeros((len(classes), 2), np.int64)
    outlines = zip(_outlines(reference, classes), _outlines(prediction, classes), strict=True)
    for row, (ours, theirs) in zip(counts, outlines, strict=True):
        row[1] = ours.shape[1] + theirs.shape[1]
        if ours.size and theirs.size:
            # both directions, since one outline may lie near the other without covering it
            row[0] = _count_near(ours, theirs, reaches) + _count_near(theirs, ours, reaches)
    return counts


def boundary_ious(
    reference: np.ndarray, prediction: np.ndarray, classes: Sequence[int], ratio: float = 0.02
) -> np.ndarray:
    """Return intersection and union, in pixels, of the inner boundary bands of each class: (K, 2) int64.

    The quotient is the Boundary IoU (B. Cheng et al., 2021); of counts summed over images, it is the pooled one. The
    band width is d = max(1, round(ratio * image diagonal)). A band holds the class's pixels at most d rows or columns
    away from a pixel that is not of the class or not in the image.

    Args:
        reference: (H, W) ids.
        prediction: (H, W) ids.
        classes: ids to compare.
        ratio: band width as a share of the image diagonal.
    """
    check_sizes(reference, prediction)
    ours, theirs = _band(reference, ratio), _band(prediction, ratio)
    # a pixel in both bands and of one class in both maps is in the intersection of that class's bands
    shared = reference[ours & theirs & (reference == prediction)]
    held = reference[ours], prediction[theirs]
    both = np.array([np.count_nonzero(shared == label) for label in classes], np.int64)
    each = np.array([sum(np.count_nonzero(ids == label) for ids in held) for label in classes], np.int64)
    return np.stack((both, each - both), axis=1).reshape(-1, 2)


def check_sizes(reference: np.ndarray, prediction: np.ndarray) -> None:
    """Refuse ids of two sizes, and those of several images.

    Raises:
        ValueError: naming both shapes.
    """
    if reference.shape != prediction.shape or reference.ndim != 2:
        raise ValueError(f"Reference {reference.shape} and prediction {prediction.shape}: give ids (H, W) of one size.")


def _edges(ids: np.ndarray) -> np.ndarray:
    """Return where (H, W) a pixel differs from one of its four neighbours, or lies on the image border."""
    edges = neighbour_edges(ids)
    edges[:1], edges[-1:], edges[:, :1], edges[:, -1:] = True, True, True, True
    return edges


def _outlines(ids: np.ndarray, classes: Sequence[int]) -> list[np.ndarray]:
    """Return each class's boundary pixels as (2, n) rows and columns.

    One pass over the image finds those of all classes, since each pixel belongs to one class.
    """
    flat = np.flatnonzero(_edges(ids))
    owners = ids.reshape(-1)[flat]
    return [np.stack(np.divmod(flat[owners == label], ids.shape[1])) for label in classes]


def _reaches(tolerance: float, shape: tuple[int, ...]) -> list[int]:
    """Return the maximum column distance for each row distance 0, 1, 2 ..., limited by the image size."""
    # exact: rounding would decide whether a distance equal to the tolerance counts
    square = min(math.floor(Fraction(tolerance) ** 2), shape[0] ** 2 + shape[1] ** 2)
    return [math.isqrt(square - rows * rows) for rows in range(math.isqrt(square) + 1)]


def _count_near(points: np.ndarray, targets: np.ndarray, reaches: list[int]) -> int:
    """Return how many of `points` (2, n) lie within reach of any of `targets` (2, m)."""
    far = len(reaches) - 1
    # only the bounding box of the points, plus the reach, is drawn
    start = points.min(axis=1, keepdims=True)
    height, width = (int(side) for side in points.max(axis=1) - start[:, 0] + 1)
    canvas = np.zeros((height + 2 * far, width + 2 * far), np.uint8)
    placed = targets - start + far
    row, column = placed[:, (placed >= 0).all(axis=0) & (placed[0] < len(canvas)) & (placed[1] < canvas.shape[1])]
    canvas[row, column] = 1
    near = np.zeros((height, width), np.uint8)
    wide, widened = canvas, 0
    # a disk is a stack of segments: dilate the targets to each length, and add them at the rows of that length
    for reach, heights in groupby(reversed(range(far + 1)), key=reaches.__getitem__):
        if reach > widened:
            wide = np.asarray(cv2.dilate(wide, np.ones((1, 2 * (reach - widened) + 1), np.uint8)))
            widened = reach
        for shift in {sign * rows for rows in heights for sign in (-1, 1)}:
            near |= wide[far + shift : far + shift + height, far : far + width]
    return int(np.count_nonzero(near[tuple(points - start)]))


def _band(ids: np.ndarray, ratio: float) -> np.ndarray:
    """Return where (H, W) the square of side 2d + 1 around a pixel leaves the image or holds another id."""
    depth = max(1, round(ratio * math.hypot(*ids.shape)))
    ids = ids if ids.dtype in _CV2_DTYPES else ids.astype(np.float64)
    square = np.ones((2 * depth + 1, 2 * depth + 1), np.uint8)
    inner = slice(depth, -depth), slice(depth, -depth)
    # the square of a pixel within d of the border leaves the image, whatever its ids
    band = np.ones(ids.shape, bool)
    # all ids in the square are equal where their minimum is their maximum: one pass for all classes
    band[inner] = (cv2.erode(ids, square) != cv2.dilate(ids, square))[inner]
    return band


def boundary_errors(reference: np.ndarray, prediction: np.ndarray, ignore_index: int) -> np.ndarray:
    """Return labelled and wrong pixels in bands around the reference's boundaries: (len(DISTANCES) + 1, 2) int64.

    A boundary pixel is a labelled pixel that shares an edge with a labelled pixel of another class. A pixel lies within
    k pixels of a boundary if it is less than k pixels (Euclidean, between centres) from a boundary pixel. Boundary
    pixels themselves therefore lie within 1. Each pixel counts in one band, the nearest.

    Args:
        reference: ids (H, W).
        prediction: ids (H, W).
        ignore_index: id of unlabelled pixels in the reference.
    """
    counts = np.zeros((len(DISTANCES) + 1, 2), np.int64)
    reach, height = DISTANCES[-1], len(reference)
    for top in range(0, height, _BAND_ROWS):
        bottom = min(top + _BAND_ROWS, height)
        # one row beyond the reach: the boundary test compares neighbouring rows
        first, last = max(top - reach - 1, 0), min(bottom + reach + 1, height)
        nearby = reference[first:last]
        near = _distance_bands(neighbour_edges(nearby, nearby != ignore_index))[top - first : bottom - first]
        ids = reference[top:bottom]
        labelled = ids != ignore_index
        wrong = labelled & (ids != prediction[top:bottom])
        counts[:, 0] += np.bincount(near[labelled], minlength=len(counts))
        counts[:, 1] += np.bincount(near[wrong], minlength=len(counts))
    return counts


def _distance_bands(boundary: np.ndarray) -> np.ndarray:
    """Return the band (H, W) uint8 of each pixel."""
    if not boundary.any():
        return np.full(boundary.shape, len(DISTANCES), np.uint8)
    distance = cv2.distanceTransform((~boundary).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # distances are roots of integers: slightly lowered ends make the comparison robust to rounding
    ends = np.array(DISTANCES, np.float32) - np.float32(1e-3)
    return np.digitize(distance, ends, right=True).astype(np.uint8)
