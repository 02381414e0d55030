"""Objects that a prediction finds, misses and invents."""

from collections.abc import Collection

import numpy as np

from dinoseg.core.metric import LabelledImage, PredictedImage, RowMetric
from dinoseg.core.objects import Objects
from dinoseg.extensions.objects.overlaps import overlaps

SURE = 0.5  # score from which a predicted object is found or invented


class ObjectMetric(RowMetric):
    """Base class of metrics of objects, which also find those that are missed and invented.

    Attributes:
        thing_ids: classes whose objects are compared; None: all.
    """

    needs_objects = True
    thing_ids: Collection[int] | None = None

    def find_errors(self, prediction: PredictedImage, sample: LabelledImage) -> dict[str, Objects]:
        """Return the objects that are `found`, `missed` and `invented`, see `compare_objects`."""
        assert prediction.objects is not None and sample.objects is not None
        things = range(sample.num_classes) if self.thing_ids is None else self.thing_ids
        return compare_objects(sample.objects, prediction.objects, things)


def compare_objects(reference: Objects, prediction: Objects, things: Collection[int]) -> dict[str, Objects]:
    """Return the `found` and `missed` objects of a reference and the `invented` ones of a prediction.

    A predicted object of a thing with a score of at least `SURE` finds the object of its class that it shares most
    with, if their IoU is above 0.5; the most certain one is first, and an object is found once. All others are
    invented, except those of which more than half lies in a crowd of their class.
    """
    sure = prediction.select(np.flatnonzero((prediction.scores >= SURE) & np.isin(prediction.classes, [*things])))
    common = overlaps(sure.masks, reference.masks)
    areas = np.array([mask.area for mask in sure.masks], np.int64)[:, None]
    held = np.array([mask.area for mask in reference.masks], np.int64)
    same = sure.classes[:, None] == reference.classes
    excused = (same & reference.crowds & (2 * common > areas)).any(axis=1)
    fits = same & ~reference.crowds & (2 * common > areas + held - common)
    found = np.zeros(len(reference), bool)
    invented = []
    for place in range(len(sure)):
        free = np.flatnonzero(fits[place] & ~found)
        if free.size:
            found[free[common[place, free].argmax()]] = True
        elif not excused[place]:
            invented.append(place)
    return {
        "found": reference.select(np.flatnonzero(found)),
        "missed": reference.select(np.flatnonzero(~found & ~reference.crowds)),
        "invented": sure.select(invented),
    }
