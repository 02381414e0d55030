"""A metric of another library, such as torchmetrics, as a `Metric`."""

import math
from typing import Any, Literal

import numpy as np
import torch

from dinoseg.core.metric import (
    FINITE_MEAN,
    INFINITE_IMAGES,
    Counts,
    LabelledImage,
    Metric,
    PredictedImage,
    check_image,
    format_settings,
)
from dinoseg.metrics.counts import ratio
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import check_annotations


class WrappedMetric(Metric):
    """Mean over images of a metric with `update`, `compute` and `reset`, which scores each image by itself.

    A metric that pools counts over a dataset, such as torchmetrics' JaccardIndex, thus gives another number than in its
    own library: its state is never summed, so that scores do not depend on the number of ranks and have intervals.

    An image enters no mean if no pixel counts or its value is nan. One image of infinite value makes the mean infinite.
    So a metric that is no share has two more scores, NAME_infinite_images and NAME_finite_mean, the mean of the others.

    Args:
        name: of the score.
        metric: its `update` takes predicted and reference ids 0..K-1 int64, see `ignored`.
        better: "max" or "min", the best value.
        is_share: whether its values lie in 0..1.
        ignored: what the metric receives for ignored pixels. "remove": ids (1, P) of the other pixels, for metrics that
            count pixels. "match": ids (1, H, W), where both masks have the same class at these pixels, for metrics of
            shape: the ignored class, or class 0 if `ignore_index` is no class.
    """

    @check_annotations
    def __init__(
        self,
        name: str,
        metric: Any,
        better: Literal["max", "min"] = "max",
        is_share: bool = True,
        *,
        ignored: Literal["remove", "match"],
    ) -> None:
        self.scores = {name: better}
        if not is_share:
            self.scores |= {f"{name}{INFINITE_IMAGES}": "min", f"{name}{FINITE_MEAN}": better}
            self.unbounded = tuple(self.scores)
            self.totals = (f"{name}{INFINITE_IMAGES}",)
        self._name = name
        self._metric = metric
        self._ignored = ignored
        self._worst = math.inf if better == "min" else -math.inf
        metric.reset()  # `settings` are those of a metric without a state

    @property
    def settings(self) -> str:
        """The classes and options of both metrics as text."""
        # private attributes, such as those of torchmetrics, may be a state
        options = {name: value for name, value in vars(self._metric).items() if name[0] != "_"}
        options |= vars(self._metric).get("_buffers", {})  # of a module
        return f"{super().settings} of {format_settings(self._metric, options)}"

    def count(self, prediction: PredictedImage, sample: LabelledImage) -> Counts:
        """Return the value of an image, and whether it is finite or infinite.

        Raises:
            UserError: a counted pixel of the prediction is no class, or the value is infinite in the best direction.
        """
        check_image(prediction, sample)
        counted = sample.mask != sample.ignore_index
        value = self._score_image(prediction.ids, sample, counted) if counted.any() else math.nan
        # one such image would make the mean infinitely good, whatever the others are
        if value == -self._worst:
            better = self.scores[self._name]
            raise UserError(
                f"{sample.name}: {self._name} is {value}, the best value there is with better={better}. If it is the "
                f"worst, set better={'min' if better == 'max' else 'max'}."
            )
        is_finite = math.isfinite(value)
        counts = {"images": is_finite, "infinite": math.isinf(value)}
        numbers = {name: np.array(count, np.int64) for name, count in counts.items()}
        return {"value": np.array(value if is_finite else 0.0), **numbers}

    def _score_image(self, ids: np.ndarray, sample: LabelledImage, counted: np.ndarray) -> float:
        """Return the metric of an image in which some pixels (H, W) bool are counted."""
        unknown = ids[counted & ((ids < 0) | (ids >= sample.num_classes))]
        if unknown.size:
            raise UserError(
                f"{sample.name}: The prediction holds {unknown[0]}, and {self._name} takes the classes "
                f"0..{sample.num_classes - 1}. Convert it."
            )
        if self._ignored == "remove":
            sides = [ids[counted], sample.mask[counted]]
        else:
            # an outline along ignored pixels is then equal on both sides
            matched = sample.ignore_index if 0 <= sample.ignore_index < sample.num_classes else 0
            sides = [np.where(counted, ids, matched), np.where(counted, sample.mask, matched)]
        self._metric.reset()
        self._metric.update(*(torch.from_numpy(side.astype(np.int64))[None] for side in sides))
        value = float(self._metric.compute())
        self._metric.reset()
        return value

    def compute(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return the mean over images, which is infinite if one of them is."""
        mean = ratio(sums["value"], sums["images"])
        found = {self._name: np.where(sums["infinite"] > 0, self._worst, mean)}
        if self._name in self.unbounded:
            found |= {f"{self._name}{INFINITE_IMAGES}": sums["infinite"], f"{self._name}{FINITE_MEAN}": mean}
        return found
