"""Objects that a prediction finds, misses and invents: their numbers, and pictures of their outlines."""

from collections.abc import Collection, Mapping

import cv2
import numpy as np

from dinoseg.core.metric import Counts, LabelledImage, PredictedImage, RowMetric
from dinoseg.core.objects import Objects
from dinoseg.core.runs import overlaps

SURE = 0.5  # score from which a predicted object is found or invented


class ObjectMetric(RowMetric):
    """Base class of metrics of objects, which also count and draw those that are found, missed and invented.

    Attributes:
        thing_ids: classes whose objects are compared; None: all.
    """

    needs_objects = True
    thing_ids: Collection[int] | None = None

    def count_errors(self, prediction: PredictedImage, sample: LabelledImage) -> Counts:
        """Return the numbers (K,) of objects of each class that are `found`, `missed` and `invented`."""
        compared = self._compare(prediction, sample)
        return {name: np.bincount(each.classes, minlength=sample.num_classes) for name, each in compared.items()}

    def draw_errors(
        self, prediction: PredictedImage, sample: LabelledImage, canvas: np.ndarray, colours: Mapping[str, tuple]
    ) -> None:
        """Draw the outlines of the objects."""
        for name, objects in self._compare(prediction, sample).items():
            for runs in objects.masks:
                mask = runs.to_mask(objects.size).astype(np.uint8)
                resized = cv2.resize(mask, (canvas.shape[1], canvas.shape[0]), interpolation=cv2.INTER_NEAREST)
                contours, _ = cv2.findContours(resized, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
                cv2.drawContours(canvas, contours, -1, colours[name], 2)

    def _compare(self, prediction: PredictedImage, sample: LabelledImage) -> dict[str, Objects]:
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
