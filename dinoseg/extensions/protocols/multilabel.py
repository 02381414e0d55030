"""Classes that may overlap: a folder of masks for each class, with counts pooled over all images."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.metric import LabelledImage, PredictedImage
from dinoseg.extensions.protocols.binary_masks import are_binary, from_binary
from dinoseg.extensions.protocols.contract import BadFile, Cases, Measured, ScoringCase, SumProtocol
from dinoseg.extensions.protocols.pooled import PooledMetrics
from dinoseg.extensions.protocols.trees import match, read_encoded, read_labels, refuse_ids, refuse_inside
from dinoseg.metrics.layers import LayerMetric
from dinoseg.metrics.miou import MeanIoU
from dinoseg.metrics.outlines import BoundaryIoU, SurfaceDice
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import visible_files
from dinoseg.utils.mask_files import check_layer_names, mask_paths
from dinoseg.utils.ranges import NotNegative, check_annotations
from dinoseg.utils.wording import join_names


class Multilabel(SumProtocol):
    """Pooled scores of two folders of masks CLASS/NAME.png, of 0 and 1.

    An image needs a prediction of each class. Its reference of a class may be missing: the class is absent.

    Args:
        classes: class names.
        references: reads another encoding. `references(path)` returns 0, 1 and `ignore_index` (H, W);
            `references(path, prediction, size)` does so at the prediction's size. None: the files hold these values.
        ignore_index: reference value whose pixels do not count for the class.
        boundary: whether to score the Boundary IoU, too.
        nsd: whether to score the normalised surface dice, too.
        tolerance: tolerance of the surface dice in pixels, inclusive.
        binary: references hold 0 and 255 (or 0 and 1), as predictions may, too; nothing is ignored.
    """

    name = "multilabel"
    unit = "image"
    has_layers = True

    @check_annotations
    def __init__(
        self,
        classes: Sequence[str] | None = None,
        references: Callable[..., np.ndarray] | None = None,
        ignore_index: int = 255,
        boundary: bool = False,
        nsd: bool = False,
        tolerance: NotNegative = 2,
        binary: bool = False,
    ) -> None:
        if not classes:
            raise UserError("The protocol needs the names of the classes, whose folders hold the masks: classes=[a,b].")
        if ignore_index in (0, 1):
            raise UserError(f"ignore_index={ignore_index}: masks hold 0 and 1. Give another value, such as 255.")
        check_layer_names(classes)
        self.classes, self.references = list(classes), references
        self.ignore_index, self.binary = ignore_index, binary
        outlines = [BoundaryIoU()] * boundary + [SurfaceDice(tolerance)] * nsd
        metrics = [MeanIoU(), *map(LayerMetric, outlines)]
        self._pooled = PooledMetrics(metrics, self.classes, np.zeros((len(classes), 1, 1), np.uint8))
        self.keys = self._pooled.keys
        self.rules: dict[str, Any] = {
            "absent_class": "left out of the mean; one that is only predicted counts as 0",
            "missing": "an image without a reference of a class does not show it, if it has one of another class",
            "resolution": "as stored; both sides must have the same size",
            "ignore": "nothing" if binary else f"for a class, pixels whose reference is {ignore_index}",
            "accuracy": "share of correct decisions, present or absent, over the labelled pixels of all classes",
            "aggregation": "counts of each class pooled over all images, then the mean over classes",
            "NSD": "mean over the images of a class that either side holds, then over classes",
        }

    def find(self, reference: Path, prediction: Path) -> Cases:
        """Return a case for each image with a reference of any class; its files are those of the classes in order.

        Raises:
            UserError: a folder is missing, or no image has a counterpart.
        """
        refuse_inside(reference, prediction)
        listing = match(
            self._first_files(reference, "reference"),
            self._first_files(prediction, "prediction"),
            folders=(reference, prediction),
            missing=lambda name: mask_paths(prediction, name, self.classes)[0],
        )
        for number, case in enumerate(listing.cases):
            sides = (mask_paths(folder, case.name, self.classes) for folder in (reference, prediction))
            listing.cases[number] = replace(case, files=tuple(zip(*sides, strict=True)))
        files = (file for case in listing.cases for file, _ in case.files if file.exists())
        if self.ignore_index == 255 and not self.binary and are_binary(files, self.references or read_labels):
            listing.notes.insert(
                0,
                f"reference={reference} holds 0 and 255 alone, and 255 is ignored: NO CLASS IS PRESENT. If 255 is the "
                "object, set the protocol's binary=true.",
            )
        return listing

    def measure(self, case: ScoringCase) -> Measured:
        """Return the counts of an image for each metric, one after another."""
        layers = [self._read(*files) for files in case.files]
        shape = layers[0][1].shape
        for (_, path), (_, guess) in zip(case.files, layers, strict=True):
            if guess.shape != shape:
                assert path is not None
                raise BadFile(
                    path, f"has the size {guess.shape} (H, W), and {case.files[0][1]} {shape}. Make them equal."
                )
        masks, guesses = (np.stack(side) for side in zip(*layers, strict=True))
        sample = LabelledImage(masks, len(self.classes), self.ignore_index)
        return Measured(self._pooled.count(PredictedImage(guesses), sample))

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return each score (...)."""
        return self._pooled.scores(sums)

    def per_class(self, sums: np.ndarray) -> list[dict[str, Any]]:
        """Return the scores of each class."""
        return self._pooled.per_class(sums)

    def _first_files(self, folder: Path, option: str) -> dict[str, Path]:
        """Return for each image the file of one of its classes, sorted by name."""
        found: dict[str, Path] = {}
        for label in self.classes:
            place = folder / label
            for parent, files in visible_files(place) if place.is_dir() else ():
                for file in (parent / name for name in files if name.endswith(".png")):
                    found.setdefault(file.relative_to(place).with_suffix("").as_posix(), file)
        if not found:
            raise UserError(
                f"{option}={folder} has no masks in folders of the classes {join_names(self.classes)}. Give the folder "
                "that holds CLASS/NAME.png."
            )
        return dict(sorted(found.items()))

    def _read(self, file: Path, predicted: Path | None) -> tuple[np.ndarray, np.ndarray]:
        """Return reference and prediction of a class (H, W)."""
        assert predicted is not None
        if not file.exists():
            guess = read_labels(predicted)
            return np.zeros_like(guess), from_binary(guess, predicted)
        reference, guess = read_encoded(self.references, file, predicted)
        if self.binary:
            return from_binary(reference, file), from_binary(guess, predicted)
        wrong = ~np.isin(reference, (0, 1, self.ignore_index))
        refuse_ids(reference, wrong, file, f"A mask of one class holds 0, 1 and {self.ignore_index}. Correct it.")
        return reference, from_binary(guess, predicted)
