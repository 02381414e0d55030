"""Confusion matrix of a whole data set, pixel counts of multi-label masks, and the scores derived from both."""

from copy import copy
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.metric import plain_score
from dinoseg.core.task import Task
from dinoseg.metrics.counts import mean_defined, ratio
from dinoseg.metrics.miou import MeanIoU
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import AT_LEAST_1, INTEGERS, Range, whole_number

SCORES = ("accuracy", "dice", "mean_accuracy", "miou")  # of `ConfusionMatrix.compute` for any classes
_AT_ONCE = 2**18  # pixels per chunk


class ConfusionMatrix:
    """Pixel counts of (reference class, predicted class), exact in int64.

    `counts` is one flat tensor, so that a single sum over ranks merges everything. It holds the K * K matrix in row
    order, then the number of ignored pixels, of reference ids and of predicted ids outside 0..K-1.

    Args:
        num_classes: K.
        ignore_index: ignored id; if it is one of 0..K-1, that class can never be correct and enters no mean.
        background: id of the background class, which `miou_no_background` leaves out; None without one.

    Raises:
        UserError: an argument is not a whole number, or `background` is no class.

    Examples:
        >>> import torch
        >>> from dinoseg.metrics import ConfusionMatrix
        >>> matrix = ConfusionMatrix(num_classes=2)
        >>> matrix.update(torch.tensor([[0, 1]]), torch.tensor([[0, 255]]))
        >>> matrix.compute()["miou"]
        1.0
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, background: int | None = None) -> None:
        # not by annotations: every logged step of a training makes one
        self.num_classes = whole_number(num_classes, "num_classes", AT_LEAST_1)
        self.ignore_index = whole_number(ignore_index, "ignore_index", INTEGERS)
        last = self.num_classes - 1
        ids = Range(f"the id of a class, from 0 to {last}, or None", 0, last)
        self.background = None if background is None else whole_number(background, "background", ids)
        self.counts = torch.zeros(self.num_classes**2 + 3, dtype=torch.int64)

    @property
    def matrix(self) -> Tensor:
        """Return the counts (K, K): rows are reference classes, columns are predicted classes."""
        return self.counts[: self.num_classes**2].view(self.num_classes, self.num_classes)

    def reset(self) -> None:
        """Set all counts to 0."""
        self.counts = torch.zeros_like(self.counts)

    def update(self, prediction: Tensor | np.ndarray, mask: Tensor | np.ndarray) -> None:
        """Count predicted ids (B, H, W) against reference ids (B, H, W): tensors or arrays of any integer type.

        This never synchronises with an accelerator: ids outside the classes raise here on the CPU, on other devices in
        `compute`.

        Raises:
            UserError: a mask holds an id that is neither a class nor the ignore index, or is no tensor or array.
            ValueError: the shapes differ, or a tensor is not of an integer type.
        """
        prediction, mask = as_tensor(prediction, "prediction"), as_tensor(mask, "mask")
        _check_class_ids(prediction, mask)
        # ids of a byte have 65,536 pairs, whose table takes a twentieth of the time (`_pairs`)
        if mask.device.type == "cpu" and prediction.dtype == mask.dtype == torch.uint8:
            added = self._count_pairs(_pairs(prediction.reshape(-1), mask.reshape(-1)))
        else:
            bins = self._bins(prediction.reshape(-1).long(), mask.reshape(-1).long())
            added = _histogram(bins, len(self.counts))
        # before these pixels are counted: a caller that catches the error has the counts of all masks before
        if mask.device.type == "cpu":
            self._raise_for_outsiders(added, mask)
        self.counts = self.counts.to(added.device) + added

    def _bins(self, prediction: Tensor, mask: Tensor) -> Tensor:
        """Return the index into `counts` of each of the pixels (N,) int64."""
        size = self.num_classes
        bins = mask * size + prediction
        # each `where` overrides the one before: an ignored pixel is ignored whatever is predicted there
        bins = bins.where((prediction >= 0) & (prediction < size), size**2 + 2)
        unknown = (mask < 0) | (mask >= size)
        bins = bins.where(~unknown, size**2 + 1)
        return bins.where(mask != self.ignore_index, size**2)

    def _count_pairs(self, pairs: Tensor) -> Tensor:
        """Return the contribution of (256, 256) pairs of ids to `counts`."""
        every = torch.arange(256)
        bins = self._bins(every.repeat(256), every.repeat_interleave(256))
        return torch.zeros_like(self.counts).index_add_(0, bins, pairs.flatten())

    def merge(self, other: "ConfusionMatrix") -> None:
        """Add the counts of another matrix with the same classes."""
        if (other.num_classes, other.ignore_index) != (self.num_classes, self.ignore_index):
            raise ValueError(
                f"Cannot merge {other.num_classes} classes with ignore index {other.ignore_index} into "
                f"{self.num_classes} classes with ignore index {self.ignore_index}."
            )
        self.counts = self.counts + other.counts.to(self.counts.device)

    def __add__(self, other: "ConfusionMatrix") -> Self:
        """Return a new matrix with the counts of both, on the device of this one."""
        total = copy(self)
        total.merge(other)
        return total

    def to(self, device: str | torch.device) -> Self:
        """Move the counts to a device, and return the matrix."""
        self.counts = self.counts.to(device)
        return self

    def __repr__(self) -> str:
        return (
            f"dinoseg.metrics.ConfusionMatrix({self.num_classes} classes, {int(self.matrix.sum()):,} pixels, "
            f"{int(self.counts[-3]):,} ignored)"
        )

    def compute(self) -> dict[str, Any]:
        """Return the scores as plain numbers in 0..1, ready for JSON; None means undefined.

        A class in neither the reference nor the prediction has no score ("absent") and enters no mean; nor does the
        class `ignore_index`. The recall of a class is also called its accuracy, as in `mean_accuracy`.

        Returns:
            `miou`, `background` (its id) and `miou_no_background` (both only with a background class),
            `ignored_class` (only where `ignore_index` is a class), `dice`
            (means over the present classes), `accuracy` (share of the pixels), `mean_accuracy` (mean recall over the
            reference's classes), `present_classes`, `pixels`, `ignored_pixels`, `matrix`, and `classes`: for each class
            `id`, `iou`, `dice`, `precision`, `recall`, `pixels` (reference), `predicted_pixels`.

        Raises:
            UserError: a mask held an id that is neither a class nor the ignore index.
        """
        self._raise_for_outsiders(self.counts)
        matrix = self.matrix.cpu().numpy()
        counts = np.stack([matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)])
        ignored = {"ignored_class": self.ignore_index} if 0 <= self.ignore_index < self.num_classes else {}
        # predictions of the ignored class are errors of the reference's class, and no presence of their own
        counts[2, [*ignored.values()]] = 0
        scores = score_counts(counts, self.background)
        for index in ignored.values():
            scores["classes"][index]["predicted_pixels"] = int(matrix[:, index].sum())
        return {**scores, **ignored, "ignored_pixels": int(self.counts[-3]), "matrix": matrix.tolist()}

    def _raise_for_outsiders(self, counts: Tensor, mask: Tensor | None = None) -> None:
        """Refuse counts of ids outside the classes; `mask`: the reference ids, for the message."""
        references, predictions = counts[-2:].tolist()
        if references:
            found = "" if mask is None else f" (found: {self._find_outsiders(mask)})"
            raise UserError(
                f"{references} mask pixels hold ids outside 0..{self.num_classes - 1}{found} that are not "
                f"the ignore index {self.ignore_index}. Correct the masks, the classes or the ignore index."
            )
        if predictions:
            raise ValueError(
                f"{predictions} predicted ids lie outside 0..{self.num_classes - 1}. Give class ids, such as 0 and 1 "
                "instead of 0 and 255."
            )

    def _find_outsiders(self, mask: Tensor) -> list[int]:
        ids = mask.long().unique()
        return ids[((ids < 0) | (ids >= self.num_classes)) & (ids != self.ignore_index)].tolist()


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
        """Count predicted layers (..., K, H, W) of 0 and 1 against reference layers of the same shape."""
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
        scores = score_counts(self.counts[:-1].view(4, -1).cpu().numpy(), self.background)
        return {**scores, "ignored_pixels": int(self.counts[-1]), "matrix": None}


def make_counts(
    task: Task, num_classes: int, ignore_index: int, background: int | None = None
) -> ConfusionMatrix | LayerCounts:
    """Return empty counts for the masks of a task."""
    kind = LayerCounts if task.has_layers else ConfusionMatrix
    return kind(num_classes, ignore_index, background)


def score_counts(counts: np.ndarray, background: int | None) -> dict[str, Any]:
    """Return the scores of `ConfusionMatrix.compute` from those counts of `MeanIoU`: (3, K), or of layers (4, K)."""
    metric, sums = MeanIoU(), {"classes": counts}
    means, values = metric.compute(sums), metric.per_class(sums)
    objects = {}
    if background is not None:
        mean = plain_score(mean_defined(np.delete(values["iou"], background)))
        objects = {"background": background, "miou_no_background": mean}
    right, reference, predicted = counts[:3]
    shares = {
        "iou": values["iou"],
        "dice": values["dice"],
        "precision": ratio(right, predicted),
        "recall": values["accuracy"],
    }
    numbers = zip(reference.tolist(), predicted.tolist(), strict=True)
    return {
        "miou": plain_score(means["miou"]),
        **objects,
        **{name: plain_score(means[name]) for name in ("dice", "accuracy", "mean_accuracy")},
        "present_classes": int(np.isfinite(values["iou"]).sum()),
        "pixels": int(reference.sum()),
        "classes": [
            {"id": index, **{name: plain_score(each[index]) for name, each in shares.items()}}
            | {"pixels": held, "predicted_pixels": found}
            for index, (held, found) in enumerate(numbers)
        ],
    }


def commonest_class(matrix: list[list[int]]) -> tuple[int, float]:
    """Return the most frequent class of the reference, and the mIoU of predicting it everywhere; 0.0 without pixels."""
    pixels = [sum(row) for row in matrix]
    commonest = pixels.index(max(pixels))
    present = sum(count > 0 for count in pixels)
    # the IoU of that class is its share of the pixels, that of the other present ones 0
    return commonest, pixels[commonest] / sum(pixels) / present if present else 0.0


def as_tensor(value: Any, name: str) -> Tensor:
    """Return a tensor, or an array as one.

    Raises:
        UserError: it is a list or a masked array; the message begins with its name.
    """
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray) or isinstance(value, np.ma.MaskedArray):  # torch would ignore the mask
        raise UserError(f"{name} is of type {type(value).__name__}. Give a tensor or an array.")
    # torch takes no read-only arrays, no flipped ones, and no bytes in the other order
    return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))


def _check_class_ids(prediction: Tensor, mask: Tensor) -> None:
    if prediction.shape != mask.shape:
        raise ValueError(
            f"Prediction {tuple(prediction.shape)} and mask {tuple(mask.shape)} differ. Give class ids of one size, "
            "such as logits.argmax(1)."
        )
    for name, ids in (("prediction", prediction), ("mask", mask)):
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(
                f"The {name} is {ids.dtype}. Give ids of an integer type, such as {name}.long(). "
                "Count layers by MeanIoU."
            )


def _pairs(prediction: Tensor, mask: Tensor) -> Tensor:
    """Return the count of each pair of ids (N,) uint8: (256, 256), by reference and prediction.

    Counting all pairs of bytes, chunk by chunk, takes a twentieth of the time of int64 bins.
    """
    table = torch.zeros(2**16, dtype=torch.int64)
    for predicted, wanted in zip(prediction.split(_AT_ONCE), mask.split(_AT_ONCE), strict=True):
        table += torch.bincount(wanted.int().mul_(256).add_(predicted), minlength=2**16)
    return table.view(256, 256)


def _histogram(bins: Tensor, length: int) -> Tensor:
    if bins.device.type in ("cpu", "mps"):
        return torch.bincount(bins, minlength=length)
    # on CUDA, torch.bincount reads back the largest value, which synchronises
    zeros = torch.zeros(length, dtype=torch.int64, device=bins.device)
    return zeros.scatter_add_(0, bins, torch.ones_like(bins))
