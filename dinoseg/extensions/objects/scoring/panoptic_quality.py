"""Panoptic quality of segments that do not overlap; no torch (A. Kirillov et al., CVPR 2019)."""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dinoseg.core.metric import Counts, LabelledImage, Metric, PredictedImage
from dinoseg.core.objects import Objects
from dinoseg.extensions.objects.reading.things import find_things
from dinoseg.extensions.objects.scoring.errors import ObjectMetric
from dinoseg.metrics.counts import mean_defined, ratio
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Natural
from dinoseg.utils.wording import join_names

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


def paint_segments(objects: Objects, order: Iterable[int]) -> Segments:
    """Return objects as segments; where they overlap, the last one in `order` counts. A hidden one is left out."""
    ids = np.zeros(objects.size, np.int64)
    for place in order:
        objects.masks[place].paint(ids, place + 1)
    numbers = np.unique(ids[ids > 0])
    return Segments(ids, numbers, objects.classes[numbers - 1], objects.crowds[numbers - 1])


def add_stuff(segments: Segments, mask: np.ndarray, stuff: Iterable[int]) -> Segments:
    """Return the segments of things with those of stuff: each class of a mask (H, W) outside of all objects."""
    ids, first = segments.ids.copy(), segments.numbers.max(initial=0) + 1
    free = ids == 0
    classes = [label for label in stuff if (free & (mask == label)).any()]
    for number, label in enumerate(classes, first):
        ids[free & (mask == label)] = number
    return Segments(
        ids,
        np.concatenate([segments.numbers, np.arange(first, first + len(classes))]),
        np.concatenate([segments.classes, np.array(classes, np.int64)]),
        np.concatenate([segments.crowds, np.zeros(len(classes), bool)]),
    )


class PanopticQuality(ObjectMetric, Metric):
    """PQ, SQ and RQ: means over all classes with a segment, and over those of things and of stuff.

    Segments of the reference are its objects, of which later ones cover earlier ones and all cover crowds, and each
    class of stuff in the mask. All other pixels are void. Of predicted objects that overlap, the best one counts.

    Args:
        classes: names in the order of their ids.
        things: names of the classes that have objects; None: all but the background.
        background: name or id of the class that is no object; None: there is none.

    Raises:
        UserError: a name is no class, or no class is a thing.
    """

    scores = dict.fromkeys((f"{name}{suffix}" for suffix in GROUPS for name in ("PQ", "SQ", "RQ")), "max")
    class_columns = ("PQ", "SQ", "RQ")

    def __init__(
        self, classes: Sequence[str], things: Sequence[str] | None = None, background: str | Natural | None = None
    ) -> None:
        ground = classes.index(background) if isinstance(background, str) else background
        self.thing_ids = sorted(find_things(classes, things, ground))
        self.classes = [*classes]
        self.things = [label in self.thing_ids for label in range(len(classes))]

    def check_things(self, things: Collection[int]) -> None:
        """Refuse data with objects of other classes, whose stuff would be void."""
        different = {*np.flatnonzero(self.things).tolist()} ^ {*things}
        if different:
            differing = join_names([self.classes[label] for label in sorted(different)])
            raise UserError(
                f"data.things: the dataset and metric=[panoptic_quality] disagree on whether {differing} are things. "
                "Name all things as data.things=[NAME]."
            )

    def count(self, prediction: PredictedImage, sample: LabelledImage) -> Counts:
        """Return the counts (4, K) of an image, see `count_segments`."""
        held, found = sample.objects, prediction.objects
        assert held is not None and found is not None
        # crowds lie below all objects
        segments = paint_segments(held, sorted(range(len(held)), key=lambda place: not held.crowds[place]))
        stuff = [label for label, is_thing in enumerate(self.things) if not is_thing and label != sample.ignore_index]
        reference = add_stuff(segments, sample.mask, stuff)
        predicted = paint_segments(found, reversed(range(len(found))))
        return {"segments": count_segments(reference, predicted, len(self.things))}

    def compute(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return each score."""
        return mean_qualities(sums["segments"], np.array(self.things))

    def per_class(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return PQ, SQ and RQ of each class, and its numbers of segments by `COUNTS`."""
        numbers = np.moveaxis(sums["segments"], -2, 0)[1:].astype(np.int64)
        return class_qualities(sums["segments"]) | dict(zip(COUNTS[1:], numbers, strict=True))


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
    # segments do not overlap, so that above an IoU of 0.5 each has at most one match
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
    # a code for each pair of segments: one count over the pixels gives all intersections
    codes = places[0] * shape[1] + places[1]
    return np.bincount(codes.ravel(), minlength=shape[0] * shape[1]).reshape(shape)


def class_qualities(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Return PQ, SQ and RQ (..., K) of each class from sums (..., 4, K); nan for a class without a segment.

    SQ of a class without a hit is 0, as in the official code.
    """
    iou, hits, false, missed = np.moveaxis(sums, -2, 0)
    # PQ = sum of IoU / (TP + FP / 2 + FN / 2) = SQ * RQ, SQ = sum of IoU / TP
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
