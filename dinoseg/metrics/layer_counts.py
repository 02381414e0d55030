"""Pixel counts of multi-label masks by class, and the scores derived from them."""

from typing import Any

import torch
from torch import Tensor

from dinoseg.core.task import Task
from dinoseg.metrics.confusion import ConfusionMatrix, class_scores, mean_scores


class LayerCounts:
    """Pixel counts of each class in layers of 0, 1 and `ignore_index`, exact in int64.

    `counts` (4 K + 1,) holds the hits, the reference's pixels, the predicted pixels and the labelled pixels of each
    class, the first three over its labelled pixels, and the number of ignored pixels of all layers.

    Args:
        num_classes: K.
        ignore_index: mask value of unlabelled pixels of a class.
        background: ID of the class that `miou_no_background` leaves out; None without one.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, background: int | None = None) -> None:
        self.num_classes, self.ignore_index, self.background = num_classes, ignore_index, background
        self.counts = torch.zeros(4 * num_classes + 1, dtype=torch.int64)

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        """Count predicted layers (..., K, H, W) of 0 and 1 against reference layers of the same shape.

        Raises:
            ValueError: the shapes differ.
        """
        if prediction.shape != mask.shape:
            raise ValueError(f"Prediction {tuple(prediction.shape)} and mask {tuple(mask.shape)} differ.")
        labelled, reference = mask != self.ignore_index, mask == 1
        predicted = (prediction == 1) & labelled
        layers = (-1, *mask.shape[-3:])
        parts = (predicted & reference, reference, predicted, labelled)
        by_class = [part.view(layers).sum(dim=(0, 2, 3)) for part in parts]
        added = torch.cat([*by_class, (~labelled).sum()[None]])
        self.counts = self.counts.to(added.device) + added

    def compute(self) -> dict[str, Any]:
        """Return the scores of `ConfusionMatrix.compute`, without a matrix.

        `pixels` counts the reference's pixels of all classes. `accuracy` is the share of correct decisions, present or
        absent, over the labelled pixels of all classes.
        """
        hits, reference, predicted, labelled = self.counts[:-1].view(4, -1).tolist()
        rows = zip(hits, reference, predicted, strict=True)
        classes = [class_scores(index, *row) for index, row in enumerate(rows)]
        correct = sum(labelled) - sum(reference) - sum(predicted) + 2 * sum(hits)
        return {
            **mean_scores(classes, sum(hits), self.background),
            "accuracy": correct / sum(labelled) if any(labelled) else None,
            "ignored_pixels": int(self.counts[-1]),
            "matrix": None,
            "classes": classes,
        }


def make_counts(
    task: Task, num_classes: int, ignore_index: int, background: int | None = None
) -> ConfusionMatrix | LayerCounts:
    """Return empty counts for the masks of a task."""
    kind = LayerCounts if task.has_layers else ConfusionMatrix
    return kind(num_classes, ignore_index, background)
