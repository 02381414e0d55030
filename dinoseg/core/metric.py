"""Base class of metrics, and what a metric counts: an image's prediction and its labels; no torch."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dinoseg.core.objects import Objects
from dinoseg.utils.errors import UserError

BINS = 1024  # equal bins of a probability; a power of 2, so that their edges are exact in float32
# numbers of objects by class in tables and reports, see `find_errors`
OBJECT_COUNTS = ("annotated", "counted", "found", "missed", "invented", "merged", "split")
BETTER = ("max", "min")  # whether the highest or the lowest value of a score is the best
# suffixes of the scores that accompany a score which may be infinite
INFINITE_IMAGES, FINITE_MEAN = "_infinite_images", "_finite_mean"
_AT_ONCE = 2**22  # counts of units that are left out at once, 32 MiB
_PLAIN = (bool, int, float, str, list, tuple, dict, type(None))

Counts = Mapping[str, np.ndarray]  # int64 or float64, by name


class PredictedImage(NamedTuple):
    """Prediction of a whole image.

    Attributes:
        ids: class ids (H, W); of a `LayerMetric`, 0 and 1 for each class (K, H, W).
        logits: class logits (K, h, w) float32 at some pixels; None unless the metric `needs_logits`.
        places: rows and columns of these pixels.
        bins: `core.task.probability_bins` (K, H, W) int16 of the class probabilities; None unless the metric
            `needs_bins`.
        objects: the predicted objects; None unless the metric `needs_objects`.

    Examples:
        >>> import numpy as np
        >>> from dinoseg.metrics import PredictedImage
        >>> PredictedImage(np.array([[0, 1]])).logits is None
        True
    """

    ids: np.ndarray
    logits: np.ndarray | None = None
    places: tuple[slice, slice] = (slice(None), slice(None))
    bins: np.ndarray | None = None
    objects: Objects | None = None


@dataclass(frozen=True)
class LabelledImage:
    """Labels of an image.

    Args:
        mask: class ids (H, W); of a `LayerMetric`, 0, 1 and `ignore_index` for each class (K, H, W).
        num_classes: K.
        ignore_index: id of pixels that do not count; if it is one of 0..K-1, that class enters no mean.
        name: of the image.
        objects: the objects of its things; None unless the metric `needs_objects`.

    Examples:
        >>> import numpy as np
        >>> from dinoseg.metrics import LabelledImage
        >>> LabelledImage(np.array([[0, 255]]), num_classes=2).ignore_index
        255
    """

    mask: np.ndarray
    num_classes: int
    ignore_index: int = 255
    name: str = ""
    objects: Objects | None = None


class RowMetric(ABC):
    """Base class of metrics, which count single images of a dataset and score all of them; they have no state.

    The counts of an image are arrays by name. They are joined in the order of the images, so that scores do not depend
    on the number of ranks. Leaving out one image or video at a time gives confidence intervals.

    Inherit `Metric` if the counts add up. Else, as of the average precision, no sum over images determines a score, and
    an image has rows of any length: the first axis of its arrays. An image without rows does not affect a score.

    Attributes:
        scores: names of the scores, the main one first, with "max" or "min": which value is the best.
        unbounded: names of the scores that may lie outside 0..1; tables show them as numbers, not in percent. Such a
            score may be infinite in its worst direction if there are also NAME_infinite_images, one of the `totals`,
            and NAME_finite_mean. Both then rank it.
        totals: names of the unbounded scores that are numbers of images: masks with layers add them up over the
            classes, and they have no interval.
        needs_logits: whether `count` needs `PredictedImage.logits`.
        needs_bins: whether `count` needs `PredictedImage.bins`. It then takes masks with layers, too, as a whole.
        needs_objects: whether `count` needs the `objects` of `PredictedImage` and `LabelledImage`.
        class_columns: names of values of `score_classes` in 0..1 that tables of objects show, next to `OBJECT_COUNTS`;
            only of a metric that has `find_errors`.

    Examples:
        >>> import numpy as np
        >>> from dinoseg.core.metric import RowMetric
        >>> class Median(RowMetric):
        ...     scores = {"median": "max"}
        ...
        ...     def count(self, prediction, sample):
        ...         return {"values": prediction.ids[sample.mask == 1]}
        ...
        ...     def score_rows(self, rows):
        ...         return {"median": np.median(np.concatenate([row["values"] for row in rows]))}
        >>> rows = [{"values": np.array([1.0, 2.0])}, {"values": np.array([4.0])}, {"values": np.array([3.0])}]
        >>> Median().leave_one_out(rows, [0, 1, 1])["median"].tolist()
        [3.5, 1.5]
    """

    scores: Mapping[str, str]
    unbounded: Collection[str] = ()
    totals: Collection[str] = ()
    needs_logits: bool = False
    needs_bins: bool = False
    needs_objects: bool = False
    class_columns: Sequence[str] = ()

    @property
    def class_name(self) -> str:
        """The name of the class, for messages; of a metric that wraps one of the user, that of the user's."""
        return type(self).__name__

    @property
    def settings(self) -> str:
        """The class and its plain values and arrays as text: runs are compared by metrics of equal settings."""
        return format_settings(self, vars(self))

    def check_classes(self, num_classes: int, *, has_layers: bool = False) -> None:  # noqa: B027
        """Refuse options that do not fit the classes of the data, before any image is counted; by default, all fit.

        Args:
            num_classes: K of the data.
            has_layers: whether masks have a layer for each class, which `LayerMetric` counts one by one.

        Raises:
            UserError: naming the parameter.
        """

    def check_things(self, things: Collection[int]) -> None:  # noqa: B027
        """Refuse options that do not fit the classes with objects of the data; by default, all fit.

        Args:
            things: ids of these classes.

        Raises:
            UserError: naming the key.
        """

    @abstractmethod
    def count(self, prediction: PredictedImage, sample: LabelledImage) -> Counts:
        """Return the counts of one image."""

    @abstractmethod
    def score_rows(self, rows: Sequence[Counts]) -> dict[str, np.ndarray]:
        """Return each score over images from the counts of each; nan where undefined."""

    def score_classes(self, rows: Sequence[Counts]) -> dict[str, np.ndarray]:
        """Return values (K,) of each class by name from the counts of each image; by default none."""
        return {}

    def leave_one_out(self, rows: Sequence[Counts], units: Sequence[int]) -> dict[str, np.ndarray]:
        """Return each score (U,) without the images of each unit; by default, each is computed again.

        Args:
            rows: counts of each image.
            units: 0..U-1 of each image.
        """
        left_out = [
            self.score_rows([row for row, own in zip(rows, units, strict=True) if own != unit])
            for unit in range(max(units, default=-1) + 1)
        ]
        return {name: np.array([found[name] for found in left_out]) for name in self.scores}

    def has_counts(self, row: Counts) -> bool:
        """Return whether the counts of an image say something about a score; by default, whether there are rows."""
        return any(np.size(each) for each in row.values())

    def find_errors(self, prediction: PredictedImage, sample: LabelledImage) -> dict[str, Objects]:
        """Return the objects that are found, missed, invented, merged and split; only of a metric of objects."""
        raise NotImplementedError

    def score_errors(self, rows: Sequence[Counts]) -> dict[str, np.ndarray]:
        """Return values (K,) of each class by name, from the numbers (K,) of `find_errors` in each image."""
        raise NotImplementedError

    def advise(self, scores: Mapping[str, Any]) -> str:
        """Return a sentence on what the scores of an evaluation do not show; by default none."""
        return ""

    def score(self, rows: Iterable[Counts]) -> dict[str, float | None]:
        """Return the scores over images from the counts of each; None where undefined.

        Raises:
            UserError: there are no images.
        """
        counts = list(rows)
        if not counts:
            raise UserError("rows: there are no counts. Give those of at least one image.")
        return {name: plain_score(value) for name, value in self.score_rows(counts).items()}


class Metric(RowMetric):
    """Base class of metrics whose counts of single images add up over a dataset: scores come from the sums.

    Examples:
        >>> import numpy as np
        >>> from dinoseg.metrics import LabelledImage, Metric, PredictedImage
        >>> class Correct(Metric):
        ...     scores = {"correct": "max"}
        ...
        ...     def count(self, prediction, sample):
        ...         labelled = sample.mask != sample.ignore_index
        ...         correct = labelled & (prediction.ids == sample.mask)
        ...         return {"correct": correct.sum(), "labelled": labelled.sum()}
        ...
        ...     def compute(self, sums):
        ...         return {"correct": sums["correct"] / sums["labelled"]}
        >>> metric, ids = Correct(), np.array([[0, 1]])
        >>> metric.score([metric.count(PredictedImage(ids), LabelledImage(ids, num_classes=2))])
        {'correct': 1.0}
    """

    @abstractmethod
    def count(self, prediction: PredictedImage, sample: LabelledImage) -> Counts:
        """Return the counts of one image; their names and shapes are those of every image of the dataset."""

    @abstractmethod
    def compute(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return each score (...) of counts (..., *shape) that are summed over images; nan where undefined."""

    def per_class(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return values (..., K) of each class by name, from the sums that `compute` takes; by default none."""
        return {}

    def score_rows(self, rows: Sequence[Counts]) -> dict[str, np.ndarray]:
        """Return each score of the sums."""
        return self.compute(sum_counts(rows))

    def score_classes(self, rows: Sequence[Counts]) -> dict[str, np.ndarray]:
        """Return the values of each class of the sums."""
        return self.per_class(sum_counts(rows))

    def leave_one_out(self, rows: Sequence[Counts], units: Sequence[int]) -> dict[str, np.ndarray]:
        """Return each score (U,) of the sums without those of each unit."""
        whole = sum_counts(rows)
        by_unit: list[list[Counts]] = [[] for _ in range(max(units, default=-1) + 1)]
        for unit, row in zip(units, rows, strict=True):
            by_unit[unit].append(row)
        at_once = max(1, _AT_ONCE // sum(value.size for value in whole.values()))
        parts = []
        for start in range(0, len(by_unit), at_once):
            sums = [sum_counts(each) for each in by_unit[start : start + at_once]]
            rest = {name: value - np.stack([each[name] for each in sums]) for name, value in whole.items()}
            parts.append(self.compute(rest))
        return {name: np.concatenate([part[name] for part in parts]) for name in self.scores}

    def has_counts(self, row: Counts) -> bool:
        """Return whether a count of an image is not 0."""
        return any(np.any(each) for each in row.values())


def check_image(prediction: PredictedImage, sample: LabelledImage) -> None:
    """Refuse ids that a metric would count wrongly: of another shape or type, or labels that are no class.

    Predicted ids of K or more pass: they are errors of the reference's class.

    Raises:
        UserError: naming the ids.
    """
    ids, mask = np.asarray(prediction.ids), np.asarray(sample.mask)
    where = f"{sample.name}: " if sample.name else ""
    for name, array in (("prediction", ids), ("mask", mask)):
        if array.dtype.kind not in "biu":
            raise UserError(f"{where}The {name} is of {array.dtype}. Give ids of an integer type.")
    if ids.shape != mask.shape:
        raise UserError(f"{where}The prediction is {list(ids.shape)}, and the mask {list(mask.shape)}. Give one size.")
    has_layers = mask.ndim > 2
    if has_layers and len(mask) != sample.num_classes:
        raise UserError(f"{where}The mask has {len(mask)} layers. Give one for each class: {sample.num_classes}.")
    last = 1 if has_layers else sample.num_classes - 1
    unknown = mask[(mask < 0) | (mask > last)]
    unknown = unknown[unknown != sample.ignore_index]
    if unknown.size:
        raise UserError(
            f"{where}The mask holds {unknown[0]}, which is neither in 0..{last} nor ignore_index="
            f"{sample.ignore_index}. Convert it, or set ignore_index."
        )
    if has_layers and ids.max(initial=0) > 1:
        raise UserError(f"{where}The prediction holds {ids.max()}. Layers hold 0 and 1: give ids > 0.")


def format_settings(metric: object, attributes: Mapping[str, object]) -> str:
    """Return the class of a metric and those attributes that are plain values, arrays or tensors as text."""
    options = sorted(attributes.items())
    known = {name: value for name, value in options if isinstance(value, _PLAIN) or hasattr(value, "tolist")}
    return f"{type(metric).__qualname__} {_format_option(known)}"


def _format_option(value: Any) -> Any:
    """Return a plain value in which each array is a hash of its values."""
    if isinstance(value, Mapping):
        return {name: _format_option(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_format_option(part) for part in value]
    # arrays and numbers of NumPy, and tensors
    return hashlib.sha256(repr(value.tolist()).encode()).hexdigest() if hasattr(value, "tolist") else value


def count_image(metric: RowMetric, prediction: PredictedImage, sample: LabelledImage) -> Counts:
    """Return the counts of one image by `metric.count`.

    Raises:
        UserError: they are not finite numbers.
    """
    counts = metric.count(prediction, sample)
    arrays = {name: np.asarray(value) for name, value in counts.items()}
    for name, value in arrays.items():
        if value.dtype.kind not in "buif":
            raise UserError(
                f"metric: `count` of {metric.class_name} returns {name} of type {value.dtype}. Return integers or "
                "floats."
            )
        if not np.isfinite(value).all():
            raise UserError(
                f"metric: `count` of {metric.class_name} returns {name}={value} for the image {sample.name}. "
                "Return 0 in all counts of an image that has nothing to count, and count infinite values by themselves."
            )
    return arrays


def check_forms(metric: Metric, counts: Sequence[Counts], names: Sequence[str]) -> None:
    """Refuse counts of other names or shapes than the first ones, whose sums would mean nothing.

    Args:
        metric: of the counts.
        counts: of each image.
        names: of the images.

    Raises:
        UserError: naming two images.
    """
    forms = [[(name, np.shape(value)) for name, value in row.items()] for row in counts]
    odd = next((place for place, form in enumerate(forms) if form != forms[0]), None)
    if odd is not None:
        raise UserError(
            f"metric: `count` of {metric.class_name} returns counts of {forms[odd]} for the image {names[odd]}, "
            f"and of {forms[0]} for {names[0]}. Return the same names and shapes for every image, in the same order."
        )


def sum_counts(rows: Iterable[Counts]) -> dict[str, np.ndarray]:
    """Return the sums of the counts of images, int64 or float64, added in their order."""
    total: dict[str, np.ndarray] = {}
    for row in rows:
        for name, value in row.items():
            counts = np.asarray(value)
            # sums of narrow types overflow, and booleans add up to a boolean
            counts = counts.astype(np.float64 if counts.dtype.kind == "f" else np.int64)
            total[name] = total[name] + counts if name in total else counts
    return total


def explain_infinite_scores(name: str) -> str:
    """Return what a metric declares if single images may have an infinite value of a score."""
    both = f"{name}{INFINITE_IMAGES} and {name}{FINITE_MEAN}"
    return f"add {both} to `scores` and `unbounded`, and {name}{INFINITE_IMAGES} to `totals`"


def check_infinite_scores(metric: RowMetric) -> None:
    """Refuse a number of infinite images that is none of the `totals`, or without the mean of the others.

    Raises:
        UserError: naming the scores.
    """
    for name in metric.scores:
        number, mean = f"{name}{INFINITE_IMAGES}", f"{name}{FINITE_MEAN}"
        if number in metric.scores and (mean not in metric.scores or number not in metric.totals):
            raise UserError(
                f"metric: {metric.class_name} has the score {number}. If {name} may be infinite, "
                f"{explain_infinite_scores(name)}. Else rename it."
            )


def find_infinite_score(name: str, scores: Collection[str]) -> str | None:
    """Return the score whose infinite images, or the mean of whose others, a score is; None if it is neither."""
    score = name.removesuffix(INFINITE_IMAGES).removesuffix(FINITE_MEAN)
    return score if score != name and {score, f"{score}{INFINITE_IMAGES}"} <= {*scores} else None


def split_infinite(scores: Mapping[str, Any], name: str) -> tuple[int, float | None]:
    """Return how many images have an infinite value of a score, and the score of the others; None if undefined."""
    infinite = int(scores.get(f"{name}{INFINITE_IMAGES}") or 0)
    return infinite, scores[f"{name}{FINITE_MEAN}" if infinite else name]


def plain_score(value: np.ndarray | float) -> float | None:
    """Return a score as a number for JSON; None if it is undefined or infinite."""
    number = float(value)
    return number if np.isfinite(number) else None
