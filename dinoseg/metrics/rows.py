"""Counts of metrics for each image of a dataset, on any number of ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dinoseg.core.geometry import lattice
from dinoseg.core.metric import (
    INFINITE_IMAGES,
    Counts,
    LabelledImage,
    Metric,
    PredictedImage,
    RowMetric,
    check_forms,
    check_infinite_scores,
    count_image,
    explain_infinite_scores,
    plain_score,
)
from dinoseg.core.object_ids import OBJECTS
from dinoseg.core.objects import Objects
from dinoseg.core.sample_maps import ObjectMap, get_map_kinds
from dinoseg.core.shapes import Batch, SegmentationData
from dinoseg.metrics.confusion import SCORES
from dinoseg.utils.errors import UserError

# other names in the scores of an evaluation
_TAKEN = (
    "loss",
    "miou_no_background",
    "background",
    "ignored_class",
    "present_classes",
    "pixels",
    "ignored_pixels",
    "matrix",
    "classes",
)
_ROUNDING = 1e-9  # shares of float64 sums may exceed 1 by this much
# called with the index of an image, its pixels (3, H, W), and its objects by `find_errors`
OnErrors = Callable[[int, Tensor, Mapping[str, Objects]], None]


class MetricRows:
    """Counts of metrics for one rank's images; `add_scores` joins those of all ranks in the order of the dataset.

    Args:
        metrics: with different names of scores.
        data: the dataset.
        rank: this rank, which has every `world_size`-th image in order.
        world_size: number of ranks.
        on_errors: receives the errors of each image, if a metric has `class_columns`.

    Attributes:
        counts: of each metric, by image; set by `add_scores`.
        errors: of each image the numbers (K,) of objects by `find_errors` of the first metric with `class_columns`;
            none without any. Set by `add_scores`.

    Raises:
        UserError: a metric needs objects, which the dataset lacks, or takes other classes as things.
    """

    def __init__(
        self,
        metrics: Sequence[RowMetric],
        data: SegmentationData,
        rank: int = 0,
        world_size: int = 1,
        on_errors: OnErrors | None = None,
    ) -> None:
        self.metrics = metrics
        self.needs_bins = any(metric.needs_bins for metric in metrics)
        self.needs_objects = any(metric.needs_objects for metric in metrics)
        self._of_errors = next((metric for metric in metrics if metric.class_columns), None)
        kind = get_map_kinds(data).get(OBJECTS)
        for metric in (each for each in metrics if each.needs_objects):
            if not isinstance(kind, ObjectMap):
                raise UserError(
                    f"{metric.class_name} compares objects, and this dataset has none. Choose data with objects, such "
                    "as data=coco_instances, or another metric and task."
                )
            metric.check_things(kind.things)
        self.counts: list[list[Counts]] = [[] for _ in metrics]
        self.errors: list[Counts] = []
        self._on_errors = on_errors
        self._data, self._next, self._world = data, rank, world_size
        # index of an image in the dataset, and the counts of each metric, then those of errors
        self._rows: list[tuple[int, list[Counts]]] = []

    def add(
        self,
        batch: Batch,
        ids: Tensor,
        logits: Tensor,
        bins: Tensor | None = None,
        objects: Sequence[Objects] | None = None,
    ) -> None:
        """Count a batch, in the form that `evaluate` passes to `on_batch`.

        Args:
            batch: images with masks.
            ids: predicted class ids.
            logits: at some pixels.
            bins: (B, K, H, W); None unless `needs_bins`.
            objects: predicted in each image; None unless `needs_objects`.
        """
        classes = len(self._data.classes)
        masks, predictions = batch.mask.cpu().numpy(), ids.cpu().numpy()
        places = lattice((masks.shape[-2], masks.shape[-1]))
        sampled = logits.cpu().numpy() if any(metric.needs_logits for metric in self.metrics) else None
        binned = None if bins is None else bins.cpu().numpy()
        held = batch.maps[OBJECTS].cpu().numpy() if self.needs_objects else None
        for image, name in enumerate(batch.names):
            prediction = PredictedImage(
                predictions[image],
                None if sampled is None else sampled[image],
                places,
                None if binned is None else binned[image],
                None if objects is None else objects[image],
            )
            labelled = None if held is None else Objects.of_map(held[image])
            sample = LabelledImage(masks[image], classes, self._data.ignore_index, name, labelled)
            counts = [_count(metric, prediction, sample) for metric in self.metrics]
            if self._of_errors is not None:
                found = self._of_errors.find_errors(prediction, sample)
                counts.append({key: np.bincount(each.classes, minlength=classes) for key, each in found.items()})
                if self._on_errors is not None:
                    self._on_errors(self._next, batch.image[image], found)
            self._rows.append((self._next, counts))
            self._next += self._world

    def add_scores(self, result: dict[str, Any], gather: Callable[[list[Any]], list[Any]]) -> None:
        """Add the scores over the images of all ranks to those of a `ConfusionMatrix`, and values to its `classes`.

        Args:
            result: of `ConfusionMatrix.compute`.
            gather: returns the values of all ranks in one list, as `Engine.gather` does.

        Raises:
            UserError: a score that is not `unbounded` lies outside 0..1, a score is infinite without a number of such
                images, the scores are others than those of the class, or the counts of two images have other names or
                shapes.
        """
        rows = sorted(gather(self._rows), key=lambda row: row[0])
        self.counts = [[counts[number] for _, counts in rows] for number in range(len(self.metrics))]
        self.errors = [counts[-1] for _, counts in rows if self._of_errors is not None]
        names = [self._data.names[index] for index, _ in rows]
        for metric, counts in zip(self.metrics, self.counts, strict=True):
            if isinstance(metric, Metric):
                check_forms(metric, counts, names)
            scores = metric.score_rows(counts)
            _check_scores(metric, scores)
            result |= {name: plain_score(value) for name, value in scores.items()}
            _add_columns(result["classes"], metric.score_classes(counts))
        if self._of_errors is not None:
            _add_columns(result["classes"], self._of_errors.score_errors(self.errors))


def _add_columns(classes: Sequence[dict[str, Any]], columns: Mapping[str, np.ndarray]) -> None:
    for name, values in columns.items():
        for row, value in zip(classes, values, strict=True):
            row[name] = int(value) if values.dtype.kind in "iu" else plain_score(value)


def _count(metric: RowMetric, prediction: PredictedImage, sample: LabelledImage) -> Counts:
    """Return the counts of an image; those that add up have whole numbers in their shortest type."""
    counts = count_image(metric, prediction, sample)
    # a `RowMetric` computes with its rows: differences of narrow types would wrap around
    if not isinstance(metric, Metric):
        return counts
    # in int64, those in bins would take gigabytes
    return {
        name: value.astype(np.min_scalar_type(value.max(initial=0)))
        if value.dtype.kind == "i" and value.min(initial=0) == 0
        else value
        for name, value in counts.items()
    }


def check_score_names(metrics: Iterable[RowMetric]) -> None:
    """Refuse metrics with a score of the same name as another score of an evaluation, or with half of two scores.

    Raises:
        UserError: naming the score.
    """
    seen = {*SCORES, *_TAKEN}
    for metric in metrics:
        check_infinite_scores(metric)
        for name in metric.scores:
            if name in seen:
                raise UserError(
                    f"metric: the score {name} of {metric.class_name} has the name of another score. Leave one of "
                    "the two out, or rename it."
                )
            seen.add(name)


def _check_scores(metric: RowMetric, scores: Mapping[str, np.ndarray]) -> None:
    if scores.keys() != metric.scores.keys():
        raise UserError(
            f"metric: {metric.class_name} returns the scores {[*scores]}, and its `scores` are "
            f"{[*metric.scores]}. Return exactly these."
        )
    for name, score in scores.items():
        if np.shape(score) != ():
            raise UserError(
                f"metric: {metric.class_name} returns the score {name} of shape {np.shape(score)}. Return a number "
                "for sums of one dataset."
            )
        if name not in metric.unbounded and (score < -_ROUNDING or score > 1 + _ROUNDING):
            raise UserError(
                f"metric: the score {name} of {metric.class_name} is {float(score):.4g}, outside 0..1. Name it in "
                "`unbounded` of the class (is_share=false of a WrappedMetric): it is then shown as a number, not in "
                "percent."
            )
        if np.isinf(score) and f"{name}{INFINITE_IMAGES}" not in scores:
            raise UserError(
                f"metric: the score {name} of {metric.class_name} is {float(score)}. Return nan where it is undefined; "
                f"if single images can be infinite, {explain_infinite_scores(name)}."
            )
