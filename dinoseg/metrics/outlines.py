"""Metrics of the outlines of classes: Boundary IoU and the normalised surface dice; no torch.

Ignored pixels belong to no class on either side, so a class has an outline along them. If `ignore_index` is one of the
classes, that class is not scored.
"""

import numpy as np

from dinoseg.core.metric import Counts, LabelledImage, Metric, PredictedImage, check_image
from dinoseg.metrics.counts import mean_defined, ratio
from dinoseg.metrics.surface import boundary_ious, surface_dices
from dinoseg.utils.ranges import HighShare, NotNegative, check_annotations


class BoundaryIoU(Metric):
    """Mean over the classes of the Boundary IoU (B. Cheng et al., 2021), pooled over images.

    Args:
        ratio: width of the bands within the outlines, as a share of the image diagonal.

    Examples:
        >>> import numpy as np
        >>> from dinoseg.metrics import BoundaryIoU, LabelledImage, PredictedImage
        >>> ids = np.zeros((16, 16), np.uint8)
        >>> ids[4:12, 4:12] = 1
        >>> metric = BoundaryIoU()
        >>> metric.score([metric.count(PredictedImage(ids), LabelledImage(ids, num_classes=2))])
        {'boundary_iou': 1.0}
    """

    scores = {"boundary_iou": "max"}

    @check_annotations
    def __init__(self, ratio: HighShare = 0.02) -> None:
        self.ratio = ratio

    def count(self, prediction: PredictedImage, sample: LabelledImage) -> Counts:
        """Return intersection and union of each class's bands, in pixels: (2, K) int64."""
        reference, predicted, present = drop_ignored(prediction, sample)
        bands = np.zeros((2, sample.num_classes), np.int64)
        bands[:, present] = boundary_ious(reference, predicted, present, self.ratio).T
        return {"bands": bands}

    def compute(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return the mean over the classes that have a band."""
        return {"boundary_iou": mean_defined(self.per_class(sums)["boundary_iou"])}

    def per_class(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return the Boundary IoU of each class."""
        both, either = np.moveaxis(sums["bands"], -2, 0)
        return {"boundary_iou": ratio(both, either)}


class SurfaceDice(Metric):
    """Mean of the normalised surface dice (NSD) over all pairs of an image and a class that either side holds.

    Args:
        tolerance: distance in pixels up to which outlines agree, inclusive.

    Examples:
        >>> import numpy as np
        >>> from dinoseg.metrics import LabelledImage, PredictedImage, SurfaceDice
        >>> ids = np.zeros((16, 16), np.uint8)
        >>> ids[4:12, 4:12] = 1
        >>> metric = SurfaceDice()
        >>> metric.score([metric.count(PredictedImage(ids), LabelledImage(ids, num_classes=2))])
        {'nsd': 1.0}
    """

    scores = {"nsd": "max"}

    @check_annotations
    def __init__(self, tolerance: NotNegative = 2) -> None:
        self.tolerance = tolerance

    def count(self, prediction: PredictedImage, sample: LabelledImage) -> Counts:
        """Return the surface dice of each class, and whether the image has the class: (2, K) float64."""
        reference, predicted, present = drop_ignored(prediction, sample)
        pairs = np.zeros((2, sample.num_classes))
        pairs[0, present] = surface_dices(reference, predicted, present, self.tolerance)
        pairs[1, present] = 1
        return {"pairs": pairs}

    def compute(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return the mean over all pairs."""
        values, images = np.moveaxis(sums["pairs"], -2, 0)
        return {"nsd": ratio(values.sum(-1), images.sum(-1))}

    def per_class(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return the mean of each class over the images that have it."""
        values, images = np.moveaxis(sums["pairs"], -2, 0)
        return {"nsd": ratio(values, images)}


def drop_ignored(prediction: PredictedImage, sample: LabelledImage) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Return the ids (H, W) of both sides, K where a pixel is in no class, and the classes that either side holds."""
    check_image(prediction, sample)
    size = sample.num_classes
    known = sample.mask != sample.ignore_index
    # id K, of no class, for ignored pixels and predictions of no class
    sides = [np.where(known, np.minimum(ids, size), size).astype(np.uint16) for ids in (sample.mask, prediction.ids)]
    pixels = sum(np.bincount(ids.ravel(), minlength=size + 1)[:size] for ids in sides)
    present = [label for label in np.flatnonzero(pixels).tolist() if label != sample.ignore_index]
    return sides[0], sides[1], present
