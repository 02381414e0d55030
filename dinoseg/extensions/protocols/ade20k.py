"""ADE20K scene parsing: mean IoU over all classes and pixel accuracy, as in its benchmark."""

from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.extensions.protocols.contract import Cases, DatasetProtocol, Measured, ScoringCase
from dinoseg.extensions.protocols.trees import Tree, match, read_both, refuse_ids, refuse_inside
from dinoseg.metrics.counts import class_counts, ratio
from dinoseg.utils.ranges import UpTo255, check_annotations

_TREE = Tree()
_CLASSES = 150


class Ade20k(DatasetProtocol):
    """Scores of the scene parsing benchmark: PNGs of the same name with ids 1..150; 0 in the reference is ignored.

    Args:
        num_classes: number of classes; null for the benchmark's 150.
    """

    name = "ade20k"
    unit = "image"
    keys = ("mIoU", "pixel_accuracy")

    @check_annotations
    def __init__(self, num_classes: UpTo255 | None = None) -> None:
        self.num_classes = _CLASSES if num_classes is None else num_classes
        self.rules: dict[str, Any] = {
            "absent_class": f"0, counted: the mean is over all {self.num_classes} classes",
            "resolution": "as stored; both sides must have the same size",
            "ignore": "pixels whose reference is 0",
            "aggregation": "counts pooled over all images, then the mean over classes",
            "version": "CSAILVision/sceneparsing, evaluationCode (its Python version)",
            "final": "the benchmark ranks by the mean of mIoU and pixel_accuracy",
            "differs": [
                "official: a predicted id above the classes counts as wrong; here the file is refused, "
                "unless the reference is 0 there.",
                "official: intersections are divided by union + 2.2e-16 per image; here a union of 0 gives 0.",
            ],
        }

    def find(self, reference: Path, prediction: Path) -> Cases:
        """Return a case for each reference file."""
        refuse_inside(reference, prediction)
        return match(
            _TREE.files(reference, "reference"),
            _TREE.files(prediction, "prediction"),
            folders=(reference, prediction),
            missing=lambda name: prediction / self.target(name),
        )

    def measure(self, case: ScoringCase) -> Measured:
        """Return true positives, false positives and false negatives (3 * K,) of an image."""
        reference, prediction = read_both(case)
        labelled = reference != 0
        for ids, path in zip((reference, prediction), case.files[0], strict=True):
            assert path is not None
            rule = f"Classes are 1..{self.num_classes} and 0 is none; set num_classes if there are more."
            refuse_ids(ids, labelled & ((ids < 0) | (ids > self.num_classes)), path, rule)
        counts = class_counts(reference[labelled], prediction[labelled], self.num_classes + 1)
        return Measured(counts[:, 1:].ravel())

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return both scores (...)."""
        hits, wrong, missed = self._counts(sums)
        return {
            "mIoU": np.nan_to_num(ratio(hits, hits + wrong + missed)).mean(-1),
            "pixel_accuracy": ratio(hits.sum(-1), (hits + missed).sum(-1)),
        }

    def per_class(self, sums: np.ndarray) -> list[dict[str, Any]]:
        """Return IoU and accuracy of each class, by the class's id in the files."""
        hits, wrong, missed = self._counts(sums)
        values = zip(ratio(hits, hits + wrong + missed), ratio(hits, hits + missed), strict=True)
        return [
            {"id": index, "name": f"class {index}", "IoU": float(value), "accuracy": float(accuracy)}
            for index, (value, accuracy) in enumerate(values, start=1)
        ]

    def file_ids(self, ids: np.ndarray) -> np.ndarray:
        """Return the ids in the benchmark's files, which start at 1."""
        return (ids.astype(np.int64) + 1).astype(np.uint8)

    def _counts(self, sums: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(np.moveaxis(sums.reshape(*sums.shape[:-1], 3, self.num_classes), -2, 0))
