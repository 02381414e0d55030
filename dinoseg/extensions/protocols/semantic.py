"""Generic semantic segmentation: counts pooled over the whole data set, as in mmseg and Hugging Face evaluate."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.metric import LabelledImage, Metric, PredictedImage
from dinoseg.extensions.protocols.binary_masks import are_binary, from_binary
from dinoseg.extensions.protocols.contract import Cases, DatasetProtocol, Measured, ScoringCase
from dinoseg.extensions.protocols.pooled import PooledMetrics
from dinoseg.extensions.protocols.trees import Tree, match, read_encoded, read_labels, refuse_ids, refuse_inside
from dinoseg.metrics.miou import MeanIoU
from dinoseg.metrics.outlines import BoundaryIoU, SurfaceDice
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, NotNegative, check_annotations
from dinoseg.utils.wording import join_names

_TREE = Tree()
_BAND = 0.02  # width of the Boundary IoU band, as a share of the image diagonal


class Semantic(DatasetProtocol):
    """Pooled scores of two trees of PNGs with the same names.

    Args:
        num_classes: K; ids are 0..K-1. Null: the number of `classes`, or 2 for binary masks.
        classes: class names, or None.
        references: reads another encoding. `references(path)` returns class ids and `ignore_index` (H, W);
            `references(path, prediction, size)` does so at the prediction's size. None: the files hold class ids.
        ignore_index: reference id whose pixels do not count.
        reduce_zero_label: in references, 0 is ignored and class k is stored as k + 1; predictions hold 0..K-1.
        boundary: whether to score the Boundary IoU, too.
        nsd: whether to score the normalised surface dice, too.
        tolerance: tolerance of the surface dice in pixels, inclusive.
        binary: both sides hold 0 and 255 (or 0 and 1), which are the classes 0 and 1; nothing is ignored.
    """

    name = "semantic"
    unit = "image"

    @check_annotations
    def __init__(
        self,
        num_classes: Count | None = None,
        classes: Sequence[str] | None = None,
        references: Callable[..., np.ndarray] | None = None,
        ignore_index: int = 255,
        reduce_zero_label: bool = False,
        boundary: bool = False,
        nsd: bool = False,
        tolerance: NotNegative = 2,
        binary: bool = False,
    ) -> None:
        if binary:
            if num_classes not in (None, 2) or reduce_zero_label:
                raise UserError(
                    f"binary=true with num_classes={num_classes} reduce_zero_label={str(reduce_zero_label).lower()}: "
                    "masks of 0 and 255 have 2 classes, and no label is reduced."
                )
            num_classes = 2
        if num_classes is None and classes is None:
            raise UserError(
                "The protocol needs the number of classes. Give num_classes=19, their names as classes, or "
                "binary=true for masks of 0 and 255."
            )
        if num_classes is None or classes is None:
            classes = [f"class {index}" for index in range(num_classes or 0)] if classes is None else list(classes)
            num_classes = len(classes) if num_classes is None else num_classes
        if num_classes < 1:
            raise UserError(
                f"num_classes={num_classes}: give the number of classes, 1 or more. Their ids are 0 to num_classes - 1."
            )
        if len(classes) != num_classes:
            raise UserError(
                f"num_classes={num_classes}, but there are {len(classes)} class names ({join_names(classes)}): leave "
                "num_classes out, or correct one of them."
            )
        self.num_classes, self.classes, self.references = num_classes, classes, references
        self.ignore_index, self.reduce_zero_label, self.binary = ignore_index, reduce_zero_label, binary
        self.boundary, self.nsd, self.tolerance = boundary, nsd, tolerance
        metrics: list[Metric] = [MeanIoU()]
        if boundary:
            metrics.append(BoundaryIoU(_BAND))
        if nsd:
            metrics.append(SurfaceDice(tolerance))
        self._pooled = PooledMetrics(metrics, classes, np.zeros((1, 1), np.uint8))
        self.keys = self._pooled.keys
        self.rules = self._rules()

    def _rules(self) -> dict[str, Any]:
        ignored = f"pixels whose reference is {self.ignore_index}"
        rules: dict[str, Any] = {
            "absent_class": "left out of the mean; one that is only predicted counts as 0",
            "resolution": "as stored; both sides must have the same size",
            "ignore": f"{ignored}, or 0 or 255 as stored (reduce_zero_label)" if self.reduce_zero_label else ignored,
            "out_of_range": f"a predicted id above {self.num_classes - 1} is not a class: a false negative only; such "
            "pixels are counted as unknown_pixels_prediction",
            "aggregation": "counts pooled over all images, then the mean over classes",
            "version": "mmsegmentation 1.2.2 IoUMetric and Hugging Face evaluate mean_iou",
            "differs": [
                "mmseg sums in float32, which loses pixels above 16,777,216 in a class; here in int64.",
                "with nan_to_num=0, mmseg counts a class that occurs nowhere as 0; here it is left out.",
            ],
        }
        if 0 <= self.ignore_index < self.num_classes:
            rules["ignored_class"] = (
                f"class {self.ignore_index} counts as 0 in the means where it is predicted, as in mmseg and evaluate; "
                "dinoseg's training and mode=eval leave it out"
            )
        if self.binary:
            rules |= {"ignore": "nothing", "binary": "0 is class 0; 255 is class 1, as is 1 in a file without 255"}
        if self.boundary:
            rules["boundary_IoU"] = f"pooled like mIoU, of the bands within {_BAND:.0%} of the diagonal of the outlines"
        if self.nsd:
            rules["NSD"] = (
                f"boundary pixels within {self.tolerance} pixels of the other side's, as the mean over all pairs of "
                "an image and a class that either side holds"
            )
        if self.boundary or self.nsd:
            rules["outlines"] = "ignored pixels belong to no class on either side, so a class has an outline along them"
        return rules

    def find(self, reference: Path, prediction: Path) -> Cases:
        """Return a case for each reference file.

        Raises:
            UserError: a folder is missing, or no file has a counterpart.
        """
        refuse_inside(reference, prediction)
        listing = match(
            _TREE.files(reference, "reference"),
            _TREE.files(prediction, "prediction"),
            folders=(reference, prediction),
            missing=lambda name: prediction / self.target(name),
        )
        as_ids = not self.binary and self.num_classes > 1 and self.ignore_index == 255 and not self.reduce_zero_label
        if as_ids and are_binary((case.files[0][0] for case in listing.cases), self.references or read_labels):
            listing.notes.insert(
                0,
                f"reference={reference} holds 0 and 255 alone, and 255 is ignored: THE SCORE IS OF CLASS 0 ALONE. If "
                "255 is the object, set the protocol's binary=true.",
            )
        return listing

    def measure(self, case: ScoringCase) -> Measured:
        """Return the counts of an image for each metric, one after another."""
        reference, prediction = read_encoded(self.references, *case.files[0])
        if self.binary:
            reference, prediction = (
                from_binary(numbers, path) for numbers, path in zip((reference, prediction), case.files[0], strict=True)
            )
        ids, held = self._ids(reference, case.files[0][0])
        unknown = (prediction < 0) | (prediction >= self.num_classes)
        guess = np.where(unknown, self.num_classes, prediction)
        # an id above all classes is ignored: the protocol scores the class `ignore_index` where it is predicted
        sample = LabelledImage(np.where(held, ids, self.num_classes + 1), self.num_classes, self.num_classes + 1)
        counts = self._pooled.count(PredictedImage(guess), sample)
        return Measured(counts, {"unknown_pixels_prediction": int((unknown & held).sum())})

    def _ids(self, reference: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return a reference's class ids (H, W), and which pixels count (H, W)."""
        ids, held = reference.astype(np.int64), np.ones(reference.shape, bool)
        if self.binary:
            return ids, held
        if self.reduce_zero_label:
            ids, held = ids - 1, (reference > 0) & (reference != 255)
        ignored = ids == self.ignore_index
        held &= ~ignored
        wrong = held & ((ids < 0) | (ids >= self.num_classes))
        if wrong.any():
            foreign = np.unique(ids[wrong])
            rule = f"Classes are 0..{self.num_classes - 1} and {self.ignore_index} is ignored: set num_classes"
            if len(foreign) == 1 and not ignored.any():
                rule += f", ignore_index={foreign[0]} to ignore these pixels,"
            refuse_ids(reference, wrong, path, f"{rule} or correct it.")
        return ids, held

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each score (...)."""
        return self._pooled.scores(sums)

    def per_class(self, sums: np.ndarray) -> list[dict[str, Any]]:
        """Return the scores of each class."""
        return self._pooled.per_class(sums)
