"""A metric of another library, such as torchmetrics, as a `Metric`."""

from typing import Any, Literal

import numpy as np
import torch

from dinoseg.core.metric import Counts, LabelledImage, Metric, PredictedImage, check_image, format_settings
from dinoseg.metrics.counts import ratio


class WrappedMetric(Metric):
    """Mean over images of a metric with `update`, `compute` and `reset`, which scores each image by itself.

    A metric that pools counts over a dataset, such as torchmetrics' JaccardIndex, thus gives another number than in its
    own library: its state is never summed, so that scores do not depend on the number of ranks and have intervals.
    Images for which it is not finite are left out.

    Args:
        name: of the score.
        metric: its `update` takes predicted and reference ids (1, H, W) int64; ignored pixels hold the ignore index in
            both.
        better: "max" or "min", the best value.
        is_share: whether its values lie in 0..1.
    """

    def __init__(self, name: str, metric: Any, better: Literal["max", "min"] = "max", is_share: bool = True) -> None:
        self.scores = {name: better}
        self.unbounded = () if is_share else (name,)
        self._name, self._metric = name, metric
        metric.reset()  # `settings` are those of a metric without a state

    @property
    def settings(self) -> str:
        """The classes and options of both metrics as text."""
        # private attributes, such as those of torchmetrics, may be a state
        options = {name: value for name, value in vars(self._metric).items() if name[0] != "_"}
        options |= vars(self._metric).get("_buffers", {})  # of a module
        return f"{super().settings} of {format_settings(self._metric, options)}"

    def count(self, prediction: PredictedImage, sample: LabelledImage) -> Counts:
        """Return the value of an image, and whether it is finite."""
        check_image(prediction, sample)
        ids = np.where(sample.mask == sample.ignore_index, sample.ignore_index, prediction.ids)
        self._metric.reset()
        self._metric.update(*(torch.from_numpy(side.astype(np.int64))[None] for side in (ids, sample.mask)))
        value = float(self._metric.compute())
        self._metric.reset()
        is_finite = np.isfinite(value)
        return {"value": np.array(value if is_finite else 0.0), "images": np.array(is_finite, np.int64)}

    def compute(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return the mean over images."""
        return {self._name: ratio(sums["value"], sums["images"])}
