"""DAVIS's region similarity J, boundary measure F and statistics, for all pairs or for equal ids."""

from typing import NamedTuple

import cv2
import numpy as np

from dinoseg.metrics.counts import mean_defined
from dinoseg.metrics.surface import check_sizes

TOLERANCE = 0.008  # share of the image diagonal within which boundaries match


class Mask(NamedTuple):
    """A mask, its boundary and the pixels within the tolerance of the boundary, each (H, W) bool, with pixel counts."""

    inside: np.ndarray
    edge: np.ndarray
    near: np.ndarray
    size: int
    edge_size: int


def pair_scores(
    reference: np.ndarray,
    prediction: np.ndarray,
    num_objects: int,
    num_proposals: int,
    void: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return J and F, each (P, G) float64, of every proposal with every object of one frame.

    Args:
        reference: object ids (H, W) of any integer type: 1..G, anything else is background.
        prediction: proposal ids (H, W): 1..P, anything else is background.
        num_objects: G.
        num_proposals: P.
        void: (H, W) bool, True where a pixel is background in both.

    Raises:
        ValueError: the maps differ in size.
    """
    check_sizes(reference, prediction)
    objects = _masks(reference, num_objects, void)
    proposals = _masks(prediction, num_proposals, void)
    scores = [_score(proposal, one) for proposal in proposals for one in objects]
    region, boundary = np.array(scores, dtype=np.float64).reshape(num_proposals, num_objects, 2).transpose(2, 0, 1)
    return region, boundary


def object_scores(
    reference: np.ndarray, prediction: np.ndarray, num_objects: int, void: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return J and F, each (G,) float64, of every object with the proposal of the same id.

    This is the diagonal of `pair_scores`, without the cost of the other pairs.

    Args:
        reference: object ids (H, W) of any integer type: 1..G, anything else is background.
        prediction: proposal ids (H, W), in the same form.
        num_objects: G.
        void: (H, W) bool, True where a pixel is background in both.

    Raises:
        ValueError: the maps differ in size.
    """
    check_sizes(reference, prediction)
    pairs = zip(_masks(prediction, num_objects, void), _masks(reference, num_objects, void), strict=True)
    scores = [_score(proposal, one) for proposal, one in pairs]
    region, boundary = np.array(scores, dtype=np.float64).reshape(num_objects, 2).T
    return region, boundary


def boundary_radius(size: tuple[int, ...]) -> int:
    """Return the inclusive distance in pixels within which boundaries of an (H, W) image match."""
    return int(np.ceil(TOLERANCE * np.linalg.norm(size)))


def statistics(values: np.ndarray) -> np.ndarray:
    """Return mean, recall and decay (..., 3) of scores per frame (..., T); nan without frames.

    Recall is the share of frames above 0.5. Decay is the mean of the first quarter of the frames minus that of the
    last; the last frame of a quarter is also the first of the next. A nan frame enters no mean and counts as not
    recalled.
    """
    length = values.shape[-1]
    if length == 0:
        return np.full((*values.shape[:-1], 3), np.nan)
    # 1e-10 as in davis2017-evaluation, so that halves round up
    limits = (np.round(np.linspace(1, length, 5) + 1e-10) - 1).astype(np.int64)
    first, last = values[..., : limits[1] + 1], values[..., limits[3] :]
    recall = (values > 0.5).mean(axis=-1)
    return np.stack([mean_defined(values), recall, mean_defined(first) - mean_defined(last)], axis=-1)


def match_proposals(region: np.ndarray, boundary: np.ndarray) -> np.ndarray:
    """Return the proposal (G,) of each object, matched one to one to maximise the sum of the means of J and F.

    Args:
        region: J (P, G, T) per frame, with P at least G and T at least 1.
        boundary: F (P, G, T).
    """
    from scipy.optimize import linear_sum_assignment  # lazy: two thirds of a worker's imports, unused without matching

    # the official matching maximises the sum over objects of the mean of J and F
    quality = (region.mean(axis=2) + boundary.mean(axis=2)) / 2
    proposals, objects = linear_sum_assignment(quality, maximize=True)
    return proposals[np.argsort(objects)]


def _masks(ids: np.ndarray, count: int, void: np.ndarray | None) -> list[Mask]:
    """Return the masks of the ids 1..count, without the pixels that are void."""
    radius = boundary_radius(ids.shape)
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    # a disk of whole pixels, as of skimage.morphology in the official code
    disk = (x**2 + y**2 <= radius**2).astype(np.uint8)
    known = True if void is None else ~void.astype(bool)
    return [_mask((ids == label) & known, disk) for label in range(1, count + 1)]


def _mask(inside: np.ndarray, disk: np.ndarray) -> Mask:
    # a boundary pixel differs from its right, lower or lower-right neighbour in the image, as in davis2017-evaluation:
    # half of it lies outside the mask, unlike `surface.neighbour_edges` of a class
    edge = cv2.morphologyEx(inside.view(np.uint8), cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8), anchor=(0, 0))
    near = np.zeros(inside.shape, np.uint8)
    left, top, width, height = cv2.boundingRect(edge)
    if width:
        # dilation takes most of the time, and only this part of the image can be near
        radius = len(disk) // 2
        box = np.s_[max(top - radius, 0) : top + height + radius, max(left - radius, 0) : left + width + radius]
        near[box] = cv2.dilate(edge[box], disk)
    size = int(np.count_nonzero(inside))
    edge_size = int(np.count_nonzero(edge))
    return Mask(inside, edge.view(bool), near.view(bool), size, edge_size)


def _score(proposal: Mask, one: Mask) -> tuple[float, float]:
    """Return J and F of two masks."""
    both = np.count_nonzero(proposal.inside & one.inside)
    union = proposal.size + one.size - both
    region = both / union if union else 1.0
    # 1 where both lack a boundary, 0 where one does, by definition
    if not proposal.edge_size or not one.edge_size:
        return region, float(proposal.edge_size == one.edge_size)
    precision = np.count_nonzero(proposal.edge & one.near) / proposal.edge_size
    recall = np.count_nonzero(one.edge & proposal.near) / one.edge_size
    total = precision + recall
    # F = 2 P R / (P + R)
    return region, 2 * precision * recall / total if total else 0.0
