"""Objects that a prediction finds, misses, invents, merges and splits."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from dinoseg.core.metric import Counts, LabelledImage, PredictedImage, RowMetric, sum_counts
from dinoseg.core.objects import Objects
from dinoseg.extensions.objects.overlaps import overlaps

_TOLERATED = 0.1  # share of objects that are merged or split, above which objects count as not separated


class ObjectMetric(RowMetric):
    """Base class of metrics of objects, which also count those that are found, missed, invented, merged and split.

    Attributes:
        thing_ids: classes whose objects are compared; None: all.
    """

    needs_objects = True
    thing_ids: Collection[int] | None = None

    def find_errors(self, prediction: PredictedImage, sample: LabelledImage) -> dict[str, Objects]:
        """Return the objects that are `found`, `missed`, `invented`, `merged` and `split`, see `compare_objects`."""
        assert prediction.objects is not None and sample.objects is not None
        things = range(sample.num_classes) if self.thing_ids is None else self.thing_ids
        return compare_objects(sample.objects, prediction.objects, things)

    def score_errors(self, rows: Sequence[Counts]) -> dict[str, np.ndarray]:
        """Return the sums (K,), `annotated`, `counted` and `count_error`: mean absolute error of an image's count."""
        sums = sum_counts(rows)
        errors = [np.abs(row["invented"].astype(np.int64) - row["missed"]) for row in rows]
        return {
            "annotated": sums["found"] + sums["missed"],
            "counted": sums["found"] + sums["invented"],
            **sums,
            "count_error": np.mean(errors, axis=0),
        }

    def advise(self, scores: Mapping[str, Any]) -> str:
        """Return how many objects are not separated, or counted several times, if they are many."""
        classes = scores["classes"]
        annotated, merged, counted, split = (
            sum(row[name] for row in classes) for name in ("annotated", "merged", "counted", "split")
        )
        notes = []
        if merged > _TOLERATED * annotated:
            shared = f"{merged} of {annotated} annotated objects share a predicted one"
            notes.append(f"Objects are not separated yet: {shared}.")
        if split > _TOLERATED * counted:
            shared = f"{split} of {counted} counted objects share an annotated one"
            notes.append(f"Objects are counted several times: {shared}.")
        if notes:
            notes.append(f"The mIoU of {scores['miou']:.1%} does not show it. Train longer.")
        return " ".join(notes)


def compare_objects(reference: Objects, prediction: Objects, things: Collection[int]) -> dict[str, Objects]:
    """Return the `found`, `missed` and `merged` objects of a reference, and the `invented` and `split` predicted ones.

    A distinct predicted object of a thing (`Objects.select_distinct`) finds the object of its class that it shares most
    with, if their IoU is above 0.5; the most certain one is first, and an object is found once. All others are
    invented, except those of which more than half lies in a crowd of their class.

    Objects of the reference are merged if a predicted one of their class covers more than half of each; predicted ones
    are split if more than half of each lies in one object of their class. Each is found, missed or invented, too.
    """
    sure = prediction.select_distinct()
    sure = sure.select(np.flatnonzero(np.isin(sure.classes, [*things])))
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
    covered = same & ~reference.crowds & (2 * common > held)
    inside = same & ~reference.crowds & (2 * common > areas)
    return {
        "found": reference.select(np.flatnonzero(found)),
        "missed": reference.select(np.flatnonzero(~found & ~reference.crowds)),
        "invented": sure.select(invented),
        "merged": reference.select(np.flatnonzero(covered[covered.sum(axis=1) > 1].any(axis=0))),
        "split": sure.select(np.flatnonzero(inside[:, inside.sum(axis=0) > 1].any(axis=1))),
    }
