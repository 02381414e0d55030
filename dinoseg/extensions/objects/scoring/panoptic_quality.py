"""Panoptic quality of segments that do not overlap; no torch (A. Kirillov et al., CVPR 2019)."""

from typing import NamedTuple

import numpy as np

from dinoseg.metrics.counts import mean_defined, ratio

COUNTS = ("iou", "hits", "false_positives", "false_negatives")  # of each class; the first is a sum over the hits
GROUPS = {"": None, "_things": True, "_stuff": False}  # suffixes of the scores, and whether classes are things


class Segments(NamedTuple):
    """Segments of an image.

    Attributes:
        ids: (H, W) int64 of segments; 0 is void.
        numbers: (N,) int64, the id of each segment, which occurs in `ids`; every id but 0 is listed.
        classes: (N,) int64, 0..K-1.
        crowds: (N,) bool, whether one is an area of many objects; of references.
    """

    ids: np.ndarray
    numbers: np.ndarray
    classes: np.ndarray
    crowds: np.ndarray


def count_segments(reference: Segments, prediction: Segments, num_classes: int) -> np.ndarray:
    """Return the counts (4, K) float64 of an image, in the order of `COUNTS`.

    Segments of one class match if their IoU is above 0.5; void pixels of the reference are no part of the union. A
    predicted segment does not count if more than half of it is void, or in the last crowd of its class.
    """
    common = _count_common(reference, prediction)
    void = common[0, 1:]
    inside = common[1:, 1:]
    held = common[1:].sum(axis=1)
    predicted = common[:, 1:].sum(axis=0)
    iou = ratio(inside, held[:, None] + predicted - inside - void)
    same = reference.classes[:, None] == prediction.classes
    matches = same & ~reference.crowds[:, None] & (iou > 0.5)
    places = np.flatnonzero(reference.crowds)
    # of several crowds of a class in one image, the official code excuses by the last alone
    last_crowds = dict(zip(reference.classes[places].tolist(), places.tolist(), strict=True))
    excused = void.copy()
    for column, label in enumerate(prediction.classes.tolist()):
        if label in last_crowds:
            excused[column] += inside[last_crowds[label], column]
    false = ~matches.any(axis=0) & (excused / np.maximum(predicted, 1) <= 0.5)
    missed = ~matches.any(axis=1) & ~reference.crowds
    rows, columns = np.nonzero(matches)
    hits = reference.classes[rows]
    return np.stack(
        [
            np.bincount(hits, iou[rows, columns], num_classes),
            np.bincount(hits, minlength=num_classes),
            np.bincount(prediction.classes[false], minlength=num_classes),
            np.bincount(reference.classes[missed], minlength=num_classes),
        ]
    )


def _count_common(reference: Segments, prediction: Segments) -> np.ndarray:
    """Return the common pixels (N + 1, M + 1) int64 of each two segments; void is first on both sides."""
    places = []
    for side in (reference, prediction):
        order = np.argsort(side.numbers)
        found = np.searchsorted(side.numbers[order], side.ids)
        places.append(np.where(side.ids == 0, 0, np.concatenate([order, [0]])[found] + 1))
    shape = len(reference.numbers) + 1, len(prediction.numbers) + 1
    codes = places[0] * shape[1] + places[1]
    return np.bincount(codes.ravel(), minlength=shape[0] * shape[1]).reshape(shape)


def class_qualities(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Return PQ, SQ and RQ (..., K) of each class from sums (..., 4, K); nan for a class without a segment.

    SQ of a class without a hit is 0, as in the official code.
    """
    iou, hits, false, missed = np.moveaxis(sums, -2, 0)
    divisor = hits + false / 2 + missed / 2
    mean_iou = np.divide(iou, hits, out=np.zeros(hits.shape), where=hits > 0)
    return {"PQ": ratio(iou, divisor), "SQ": np.where(divisor > 0, mean_iou, np.nan), "RQ": ratio(hits, divisor)}


def mean_qualities(sums: np.ndarray, things: np.ndarray) -> dict[str, np.ndarray]:
    """Return the means (...) of PQ, SQ and RQ over all classes, things and stuff; nan without any such segment.

    Args:
        sums: (..., 4, K).
        things: (K,) bool, whether a class is one of things.
    """
    found = class_qualities(sums)
    places = {suffix: slice(None) if group is None else things == group for suffix, group in GROUPS.items()}
    return {
        f"{name}{suffix}": mean_defined(values[..., place])
        for suffix, place in places.items()
        for name, values in found.items()
    }
