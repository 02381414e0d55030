"""Wrong pixels by their distance from the boundaries of the reference; no torch."""

import cv2
import numpy as np

from dinoseg.metrics.surface import neighbour_edges

DISTANCES = (1, 2, 4, 8, 16)  # upper ends of the bands in pixels; one more band holds all farther pixels
_ROWS = 1024  # rows per chunk, to limit the memory for huge images


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
    for top in range(0, height, _ROWS):
        bottom = min(top + _ROWS, height)
        # one row beyond the reach: the boundary test compares neighbouring rows
        first, last = max(top - reach - 1, 0), min(bottom + reach + 1, height)
        nearby = reference[first:last]
        near = _bands(neighbour_edges(nearby, nearby != ignore_index))[top - first : bottom - first]
        ids = reference[top:bottom]
        labelled = ids != ignore_index
        wrong = labelled & (ids != prediction[top:bottom])
        counts[:, 0] += np.bincount(near[labelled], minlength=len(counts))
        counts[:, 1] += np.bincount(near[wrong], minlength=len(counts))
    return counts


def _bands(boundary: np.ndarray) -> np.ndarray:
    """Return the band (H, W) uint8 of each pixel."""
    if not boundary.any():
        return np.full(boundary.shape, len(DISTANCES), np.uint8)
    distance = cv2.distanceTransform((~boundary).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # distances are roots of integers: slightly lowered ends make the comparison robust to rounding
    ends = np.array(DISTANCES, np.float32) - np.float32(1e-3)
    return np.digitize(distance, ends, right=True).astype(np.uint8)
