"""DAVIS's region similarity J, boundary measure F and statistics, of all pairs or of the same ids."""

from functools import lru_cache

import numpy as np

from dinoseg.metrics.bit_masks import Frame, Mask

TOLERANCE = 0.008  # share of the image's diagonal within which boundaries match


def pair_scores(
    reference: np.ndarray,
    prediction: np.ndarray,
    num_objects: int,
    num_proposals: int,
    void: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return J and F, each (P, G) float64, of every proposal with every object of one frame.

    Each mask's boundary is found and widened once, on bits, so that the cost hardly depends on what the masks
    look like.

    Args:
        reference: object ids (H, W) of any integer type: 1..G, anything else is background.
        prediction: proposal ids (H, W): 1..P, anything else is background.
        num_objects: G, at most 255.
        num_proposals: P, at most 255.
        void: True (H, W) where a pixel is background in both.

    Raises:
        ValueError: the maps differ in size, or more than 255 masks.
    """
    _check_frame(reference, prediction, max(num_objects, num_proposals))
    maps = [(reference, num_objects), (prediction, num_proposals)]
    known = [(_known(ids, count, void), range(1, count + 1)) for ids, count in maps]
    objects, proposals = _frame(reference.shape).masks(known)
    scores = [_score(proposal, one) for proposal in proposals for one in objects]
    region, boundary = np.array(scores, dtype=np.float64).reshape(num_proposals, num_objects, 2).transpose(2, 0, 1)
    return region, boundary


def object_scores(
    reference: np.ndarray, prediction: np.ndarray, num_objects: int, void: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return J and F, each (G,) float64, of every object with the proposal of the same id.

    The diagonal of `pair_scores`, without the cost of the other pairs.

    Args:
        reference: object ids (H, W) of any integer type: 1..G, anything else is background.
        prediction: proposal ids (H, W), likewise.
        num_objects: G, at most 255.
        void: True (H, W) where a pixel is background in both.

    Raises:
        ValueError: the maps differ in size, or more than 255 masks.
    """
    _check_frame(reference, prediction, num_objects)
    frame = _frame(reference.shape)
    maps = [_known(ids, num_objects, void) for ids in (reference, prediction)]
    scores = []
    for start in range(1, num_objects + 1, frame.at_once):
        labels = range(start, min(start + frame.at_once, num_objects + 1))
        pairs = zip(*frame.masks([(ids, labels) for ids in maps]), strict=True)
        scores += [_score(proposal, one) for one, proposal in pairs]
    region, boundary = np.array(scores, dtype=np.float64).reshape(num_objects, 2).T
    return region, boundary


def boundary_radius(size: tuple[int, ...]) -> int:
    """Return the distance in pixels, itself included, within which boundaries of an (H, W) image match."""
    return int(np.ceil(TOLERANCE * np.linalg.norm(size)))


def statistics(values: np.ndarray) -> np.ndarray:
    """Return mean, recall and decay (..., 3) of scores per frame (..., T); nan without a frame.

    Recall is the share of frames above 0.5. Decay is the mean of the first quarter of the frames less that
    of the last, where a quarter's last frame is also the next one's first. A frame of nan is in no mean and
    not recalled.
    """
    length = values.shape[-1]
    if length == 0:
        return np.full((*values.shape[:-1], 3), np.nan)
    limits = (np.round(np.linspace(1, length, 5) + 1e-10) - 1).astype(np.int64)
    first, last = values[..., : limits[1] + 1], values[..., limits[3] :]
    recall = (values > 0.5).mean(axis=-1)
    return np.stack([_mean(values), recall, _mean(first) - _mean(last)], axis=-1)


def match_proposals(region: np.ndarray, boundary: np.ndarray) -> np.ndarray:
    """Return the proposal (G,) of each object that makes the sum of the means of J and F greatest, one to one.

    Args:
        region: J (P, G, T) per frame, with P at least G and T at least 1.
        boundary: F (P, G, T).
    """
    from scipy.optimize import linear_sum_assignment  # two thirds of what a process imports, where nothing is matched

    quality = (region.mean(axis=2) + boundary.mean(axis=2)) / 2
    proposals, objects = linear_sum_assignment(quality, maximize=True)
    return proposals[np.argsort(objects)]


def _mean(values: np.ndarray) -> np.ndarray:
    defined = ~np.isnan(values)
    count = defined.sum(axis=-1)
    total = np.where(defined, values, 0.0).sum(axis=-1)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def _check_frame(reference: np.ndarray, prediction: np.ndarray, count: int) -> None:
    if reference.shape != prediction.shape or reference.ndim != 2:
        raise ValueError(f"The reference is {reference.shape} and the prediction {prediction.shape}; both are (H, W).")
    if count > 255:
        raise ValueError(f"At most 255 masks in a frame, and there are {count}.")


@lru_cache(maxsize=8)
def _frame(size: tuple[int, ...]) -> Frame:
    return Frame(size, boundary_radius(size))


def _known(ids: np.ndarray, count: int, void: np.ndarray | None) -> np.ndarray:
    """Return ids (H, W) uint8, of which 1..count are as given, 0 where void."""
    if ids.dtype != np.uint8:
        ids = np.where((ids > 0) & (ids <= count), ids, 0).astype(np.uint8)
    return ids if void is None else ids * ~void


def _score(proposal: Mask, one: Mask) -> tuple[float, float]:
    """Return J and F of two masks."""
    both = proposal.inside.shared(one.inside)
    union = proposal.size + one.size - both
    region = both / union if union else 1.0
    if not proposal.edge_size or not one.edge_size:
        return region, float(proposal.edge_size == one.edge_size)
    precision = proposal.edge.shared(one.near) / proposal.edge_size
    recall = one.edge.shared(proposal.near) / one.edge_size
    total = precision + recall
    return region, 2 * precision * recall / total if total else 0.0
