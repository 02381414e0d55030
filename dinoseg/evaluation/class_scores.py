"""Class scores as functions of sums over units, so that leaving out units gives their confidence intervals."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dinoseg.evaluation.collected import class_ious
from dinoseg.metrics.counts import mean_defined, ratio


@dataclass(frozen=True)
class ClassScores:
    """Scores of a confusion matrix by name: `miou`, `dice`, `accuracy`, and `iou/ID` of each class.

    Args:
        num_classes: K.
        background: id of the background class, which adds `miou_no_background`; None without one.
    """

    num_classes: int
    background: int | None = None
    signed: ClassVar[Collection[str]] = ()
    highest: ClassVar[Mapping[str, float]] = {}

    @property
    def means(self) -> Sequence[str]:
        """Return the names of the scores over all classes."""
        return ("miou", *(() if self.background is None else ("miou_no_background",)), "dice", "accuracy")

    @property
    def keys(self) -> Sequence[str]:
        """Return the names of all scores."""
        return (*self.means, *(f"iou/{index}" for index in range(self.num_classes)))

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each score (...) from sums (..., 3 K) of `class_counts`; nan where undefined."""
        counts = sums.reshape(*sums.shape[:-1], 3, self.num_classes).astype(np.float64)
        ious = class_ious(counts)
        right, reference, predicted = np.moveaxis(counts, -2, 0)
        scores = {
            "miou": mean_defined(ious),
            "dice": mean_defined(ratio(2 * right, reference + predicted)),
            "accuracy": ratio(right.sum(axis=-1), reference.sum(axis=-1)),
        }
        if self.background is not None:
            scores["miou_no_background"] = mean_defined(np.delete(ious, self.background, axis=-1))
        return scores | {f"iou/{index}": ious[..., index] for index in range(self.num_classes)}


def unit_sums(counts: np.ndarray, units: Sequence[str]) -> np.ndarray:
    """Return the sums (U, 3 K) of per-image counts (N, 3, K) by unit, in the order of the units' first images."""
    places = {unit: index for index, unit in enumerate(dict.fromkeys(units))}
    sums = np.zeros((len(places), *counts.shape[1:]), np.int64)
    np.add.at(sums, [places[unit] for unit in units], counts)
    return sums.reshape(len(places), -1)
