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
    check_forms,
    check_infinite_scores,
    count_image,
    explain_infinite_scores,
    plain_score,
    sum_counts,
)
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
Row = tuple[int, list[Counts]]  # index of an image in the dataset, and the counts of each metric


class MetricRows:
    """Counts of metrics for one rank's images; `add_scores` joins those of all ranks in the order of the dataset.

    Args:
        metrics: with different names of scores.
        data: the dataset.
        rank: this rank, which has every `world_size`-th image in order.
        world_size: number of ranks.
    """

    def __init__(self, metrics: Sequence[Metric], data: SegmentationData, rank: int = 0, world_size: int = 1) -> None:
        self.metrics = metrics
        self.counts: list[list[Counts]] = [[] for _ in metrics]  # of each metric, by image; set by `add_scores`
        self._data, self._next, self._world = data, rank, world_size
        self._rows: list[Row] = []

    def add(self, batch: Batch, ids: Tensor, logits: Tensor, bins: Tensor | None = None) -> None:
        """Count a batch, in the form that `evaluate` passes to `on_batch`; bins (B, K, H, W) if a metric needs them."""
        masks, predictions = batch.mask.cpu().numpy(), ids.cpu().numpy()
        places = lattice((masks.shape[-2], masks.shape[-1]))
        needs_logits = any(metric.needs_logits for metric in self.metrics)
        sampled = logits.cpu().numpy() if needs_logits else None
        binned = None if bins is None else bins.cpu().numpy()
        for image, name in enumerate(batch.names):
            prediction = PredictedImage(
                predictions[image],
                None if sampled is None else sampled[image],
                places,
                None if binned is None else binned[image],
            )
            sample = LabelledImage(masks[image], len(self._data.classes), self._data.ignore_index, name)
            counts = [_narrow(count_image(metric, prediction, sample)) for metric in self.metrics]
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
        names = [self._data.names[index] for index, _ in rows]
        for metric, counts in zip(self.metrics, self.counts, strict=True):
            check_forms(metric, counts, names)
            sums = sum_counts(counts)
            scores = metric.compute(sums)
            _check_scores(metric, scores)
            result |= {name: plain_score(value) for name, value in scores.items()}
            for name, values in metric.per_class(sums).items():
                for row, value in zip(result["classes"], values, strict=True):
                    row[name] = plain_score(value)


def _narrow(counts: Counts) -> Counts:
    """Return counts with whole numbers in their shortest type: in int64, those in bins would take gigabytes."""
    return {
        name: value.astype(np.min_scalar_type(value.max(initial=0)))
        if value.dtype.kind == "i" and value.min(initial=0) == 0
        else value
        for name, value in counts.items()
    }


def check_score_names(metrics: Iterable[Metric]) -> None:
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


def _check_scores(metric: Metric, scores: Mapping[str, np.ndarray]) -> None:
    if scores.keys() != metric.scores.keys():
        raise UserError(
            f"metric: `compute` of {metric.class_name} returns the scores {[*scores]}, and its `scores` are "
            f"{[*metric.scores]}. Return exactly these."
        )
    for name, score in scores.items():
        if np.shape(score) != ():
            raise UserError(
                f"metric: `compute` of {metric.class_name} returns {name} of shape {np.shape(score)}. Return a number "
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
