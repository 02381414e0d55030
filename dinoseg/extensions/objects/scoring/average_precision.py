"""Average precision of instance masks by the rules of COCO; no torch.

An image has a row for each predicted object and for each object of the reference. Precisions and recalls come from all
rows of a class, sorted by score, so that no sum over images determines them (T.-Y. Lin et al., ECCV 2014).
"""

from collections.abc import Sequence

import numpy as np

from dinoseg.core.metric import Counts, LabelledImage, PredictedImage
from dinoseg.core.objects import Objects
from dinoseg.extensions.objects.overlaps import overlaps
from dinoseg.extensions.objects.scoring.errors import ObjectMetric
from dinoseg.extensions.objects.scoring.precision_curves import leave_units_out, make_curves
from dinoseg.metrics.counts import mean_defined, ratio
from dinoseg.utils.ranges import Count

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the IoU
MAX_DETECTIONS = 100  # of an image and a class
SIZES = ("", "s", "m", "l")  # suffixes of the scores: all objects, small, medium and large ones
_HIGHEST_AREA = 1e5**2
# inclusive on both sides: an object of exactly 32 x 32 pixels is small and medium
AREAS = np.array([(0, _HIGHEST_AREA), (0, 32**2), (32**2, 96**2), (96**2, _HIGHEST_AREA)])
_NEARLY_ONE = 1 - 1e-10  # the highest IoU that is demanded: a share may be rounded down


def count_instances(
    reference: Objects, prediction: Objects, areas: np.ndarray = AREAS, *, is_crowd_iou: bool = False
) -> Counts:
    """Return the rows of an image, for `InstanceAveragePrecision`.

    Args:
        reference: objects, of which crowds may match several predicted ones.
        prediction: objects.
        areas: lowest and highest areas (4, 2) of the sizes.
        is_crowd_iou: whether a match with a crowd is by the IoU instead of the share that lies in the crowd.

    Returns:
        Of D predicted objects, at most `MAX_DETECTIONS` of each class: `classes` (D,), `scores` (D,), and whether each
        is a true (`hits`) or a false positive (`misses`) for each range of areas and IoU, (D, 4, 10) bool. One that is
        neither is ignored. Of G reference objects: `labels` (G,) and `positives` (G, 4) bool, whether each counts.
    """
    held = reference.select(np.argsort(reference.classes, kind="stable"))
    found = _select_detections(prediction)
    by_share = held.crowds & (not is_crowd_iou)
    shares = find_ious(held, found, by_share)
    ignored = held.crowds | ~_lie_within(held.areas, areas)  # (4, G)
    hits = np.zeros((len(found), len(AREAS), len(THRESHOLDS)), bool)
    misses = np.repeat(_lie_within(found.areas, areas).T[..., None], len(THRESHOLDS), axis=-1)
    taken = np.zeros((len(AREAS), len(THRESHOLDS), len(held)), bool)
    demanded = np.minimum(THRESHOLDS, _NEARLY_ONE)[:, None]
    # an object without any match is a false positive by its area alone
    for place in np.flatnonzero((shares >= THRESHOLDS[0]).any(axis=1)):
        own = np.flatnonzero(shares[place] >= THRESHOLDS[0])
        fits = (shares[place, own] >= demanded) & (~taken[..., own] | held.crowds[own])
        regular = fits & ~ignored[:, None, own]
        # an ignored object is matched only where no other one fits
        allowed = np.where(regular.any(axis=-1, keepdims=True), regular, fits)
        values = np.where(allowed, shares[place, own], -1)
        best = own[len(own) - 1 - values[..., ::-1].argmax(axis=-1)]  # of equal IoUs, the last object
        matched = allowed.any(axis=-1)
        rows, columns = np.nonzero(matched)
        taken[rows, columns, best[matched]] = True
        hits[place] = regular.any(axis=-1)
        misses[place] &= ~matched
    return {
        "classes": found.classes,
        "scores": found.scores,
        "hits": hits,
        "misses": misses,
        "labels": held.classes,
        "positives": ~ignored.T,
    }


def _select_detections(prediction: Objects) -> Objects:
    """Return the `MAX_DETECTIONS` objects of each class with the highest scores; equal scores stay in order."""
    order = np.lexsort((-prediction.scores, prediction.classes))
    classes = prediction.classes[order]
    rank = np.arange(len(order)) - np.searchsorted(classes, classes)  # in its class
    return prediction.select(order[rank < MAX_DETECTIONS])


def find_ious(reference: Objects, prediction: Objects, by_share: np.ndarray) -> np.ndarray:
    """Return the IoUs (D, G), 0 of different classes; where `by_share` (G,), the share of the predicted object."""
    common = overlaps(prediction.masks, reference.masks)
    predicted = np.array([mask.area for mask in prediction.masks], np.int64)[:, None]
    held = np.array([mask.area for mask in reference.masks], np.int64)
    whole = np.where(by_share, predicted, predicted + held - common)
    same = prediction.classes[:, None] == reference.classes
    return np.where(same & (whole > 0), common / np.maximum(whole, 1), 0)  # two empty masks do not match


def _lie_within(areas: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """Return whether each area (N,) lies in each range (4, 2), (4, N) bool."""
    return (areas >= ranges[:, :1]) & (areas <= ranges[:, 1:])


class InstanceAveragePrecision(ObjectMetric):
    """AP over IoUs of 0.5 to 0.95, at 0.5 and 0.75, and of small, medium and large objects.

    Each is a mean over the classes that have such an object; nan without any. Sizes are areas of masks in pixels.

    Args:
        num_classes: K.
    """

    scores = dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), "max")
    class_columns = (*scores,)

    def __init__(self, num_classes: Count) -> None:
        self.num_classes = num_classes

    def count(self, prediction: PredictedImage, sample: LabelledImage) -> Counts:
        """Return the rows of an image, see `count_instances`."""
        assert prediction.objects is not None and sample.objects is not None
        return count_instances(sample.objects, prediction.objects)

    def score_rows(self, rows: Sequence[Counts]) -> dict[str, np.ndarray]:
        """Return each score over images."""
        return _select(mean_defined(self.class_values(rows).transpose(1, 2, 0)))

    def score_classes(self, rows: Sequence[Counts]) -> dict[str, np.ndarray]:
        """Return the scores (K,) of each class, and numbers of reference and predicted objects."""
        found = _select(np.moveaxis(self.class_values(rows), 0, -1))
        held = [row["labels"][row["positives"][:, 0]] for row in rows]
        predicted = [row["classes"] for row in rows]
        numbers = {
            name: np.bincount(np.concatenate(each), minlength=self.num_classes)
            for name, each in {"objects": held, "predicted": predicted}.items()
        }
        return {**found, **numbers}

    def class_values(self, rows: Sequence[Counts]) -> np.ndarray:
        """Return the AP (K, 4, 10) of each class, range of areas and IoU; nan without an object."""
        values = np.full((self.num_classes, len(AREAS), len(THRESHOLDS)), np.nan)
        for label, curves in make_curves(rows, np.arange(len(rows))):
            values[label] = curves.average()
        return values

    def leave_one_out(self, rows: Sequence[Counts], units: Sequence[int]) -> dict[str, np.ndarray]:
        """Return each score (U,) without each unit: only the classes of its objects change."""
        values = self.class_values(rows)
        defined = ~np.isnan(values)
        count = max(units, default=-1) + 1
        sums = np.tile(np.where(defined, values, 0).sum(axis=0), (count, 1, 1))
        numbers = np.tile(defined.sum(axis=0), (count, 1, 1))
        for label, curves in make_curves(rows, np.asarray(units)):
            own, changed = leave_units_out(curves)
            sums[own] += np.nan_to_num(changed) - np.nan_to_num(values[label])
            numbers[own] -= defined[label] & np.isnan(changed)
        return _select(np.moveaxis(ratio(sums, numbers), 0, -1))


def _select(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the scores (...) of values (4, 10, ...) by range of areas and IoU."""
    means = values.mean(axis=1)
    scores = {f"AP{size}": mean for size, mean in zip(SIZES, means, strict=True)}
    return {"AP": scores.pop("AP"), "AP50": values[0, 0], "AP75": values[0, 5], **scores}
