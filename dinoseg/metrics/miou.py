"""Overlap of regions: mean IoU, mean Dice and accuracies from pixel counts of each class; no torch."""

import numpy as np

from dinoseg.core.metric import Counts, LabelledImage, Metric, PredictedImage, check_image
from dinoseg.metrics.counts import mean_defined, ratio


class MeanIoU(Metric):
    """Mean IoU and Dice over the classes in references or predictions, pixel accuracy, and mean recall.

    `ConfusionMatrix` gives the same scores from the matrix of all pairs of classes.

    Examples:
        >>> import numpy as np
        >>> from dinoseg.metrics import LabelledImage, MeanIoU, PredictedImage
        >>> metric = MeanIoU()
        >>> prediction = PredictedImage(np.array([[0, 1]]))
        >>> metric.score([metric.count(prediction, LabelledImage(np.array([[0, 0]]), num_classes=2))])["miou"]
        0.25
    """

    scores = dict.fromkeys(("miou", "dice", "accuracy", "mean_accuracy"), "max")

    def count(self, prediction: PredictedImage, sample: LabelledImage) -> Counts:
        """Return the counts of `count_classes` as `classes`."""
        check_image(prediction, sample)
        return {"classes": count_classes(prediction.ids, sample)}

    def compute(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return the means over classes, and the share of correct pixels; of layers, of all decisions about a class."""
        classes = self.per_class(sums)
        return {
            "miou": mean_defined(classes["iou"]),
            "dice": mean_defined(classes["dice"]),
            "accuracy": ratio(*count_decisions(sums["classes"])),
            "mean_accuracy": mean_defined(classes["accuracy"]),
        }

    def per_class(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return IoU, Dice and accuracy, which is the recall, of each class."""
        right, reference, predicted = np.moveaxis(sums["classes"][..., :3, :], -2, 0)
        return {
            # |A and B| / |A or B|, where the union is |A| + |B| - |A and B|
            "iou": ratio(right, reference + predicted - right),
            "dice": ratio(2 * right, reference + predicted),
            "accuracy": ratio(right, reference),
        }


def count_classes(prediction: np.ndarray, sample: LabelledImage) -> np.ndarray:
    """Return correct, reference and predicted pixels of each class among the labelled pixels: (3, K) int64.

    Layers have a fourth row: the labelled pixels of each class.

    If `ignore_index` is one of the classes, its predictions are not counted: it can never be correct, so it is absent.
    Predicted ids of K or more are errors of the reference's class.

    Args:
        prediction: class ids (H, W), or layers (K, H, W) of 0 and 1, that `check_image` accepts.
        sample: labels of the image.
    """
    labelled = sample.mask != sample.ignore_index
    if sample.mask.ndim > 2:  # layers
        reference, predicted = sample.mask == 1, (prediction == 1) & labelled
        layers = np.stack([predicted & reference, reference, predicted, labelled])  # (4, K, H, W)
        return layers.sum(axis=(2, 3), dtype=np.int64)
    reference, predicted = sample.mask[labelled], prediction[labelled]
    within = predicted[(predicted != sample.ignore_index) & (predicted < sample.num_classes)]
    parts = (reference[reference == predicted], reference, within)
    return np.stack([np.bincount(ids, minlength=sample.num_classes) for ids in parts])


def count_decisions(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the correct decisions and all, each (...), from counts (..., 3, K), or of layers (..., 4, K).

    A labelled pixel is one decision; with layers it is one for each class, present or absent.
    """
    right, reference, predicted, *labelled = np.moveaxis(counts, -2, 0).sum(-1)
    if not labelled:
        return right, reference
    # right are TP + TN, and TN = labelled - reference - predicted + TP
    return labelled[0] - reference - predicted + 2 * right, labelled[0]
