"""Metrics of masks with layers: each layer is a binary mask, which a metric counts by itself; no torch."""

from dataclasses import replace

import numpy as np

from dinoseg.core.metric import Counts, LabelledImage, Metric, PredictedImage, check_forms, check_image, count_image
from dinoseg.metrics.counts import mean_defined


class LayerMetric(Metric):
    """Mean over the classes of a metric of masks (H, W), computed for each layer of masks (K, H, W) by itself.

    The metric gets each layer as a mask of two class ids: 0, absent, and 1, present. The value of a class is the one of
    id 1 if the metric's `per_class` has it, else the metric's score of these masks. Classes of undefined value are left
    out of the mean.

    Args:
        metric: of masks (H, W).

    Examples:
        >>> import numpy as np
        >>> from dinoseg.metrics import BoundaryIoU, LabelledImage, LayerMetric, PredictedImage
        >>> layers = np.zeros((2, 16, 16), np.uint8)
        >>> layers[0, 4:12, 4:12] = 1
        >>> metric = LayerMetric(BoundaryIoU())
        >>> metric.score([metric.count(PredictedImage(layers), LabelledImage(layers, num_classes=2))])
        {'boundary_iou': 1.0}
    """

    def __init__(self, metric: Metric) -> None:
        self.scores, self.unbounded, self.needs_logits = metric.scores, metric.unbounded, metric.needs_logits
        self.totals = metric.totals
        self.metric = metric

    @property
    def class_name(self) -> str:
        """The name of the class of the metric of one layer."""
        return self.metric.class_name

    @property
    def settings(self) -> str:
        """The class and options of the metric of one layer."""
        return f"layers of {self.metric.settings}"

    def count(self, prediction: PredictedImage, sample: LabelledImage) -> Counts:
        """Return the counts of each layer by name, (K, *shape)."""
        check_image(prediction, sample)
        rows = []
        for layer, mask in enumerate(sample.mask):
            logits = prediction.logits
            # the sigmoid of a logit is the softmax of 0 and this logit
            if logits is not None:
                logits = np.stack([np.zeros_like(logits[layer]), logits[layer]])
            seen = prediction._replace(ids=prediction.ids[layer], logits=logits)
            rows.append(count_image(self.metric, seen, replace(sample, mask=mask, num_classes=2)))
        check_forms(self.metric, rows, [f"{sample.name} (layer {layer})" for layer in range(len(rows))])
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def compute(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return the mean of each score over the classes, and the sum of `totals`."""
        return {
            name: value.sum(axis=-1) if name in self.totals else mean_defined(value)
            for name, value in self.per_class(sums).items()
            if name in self.scores
        }

    def per_class(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return the scores of each class, and the metric's own values of id 1."""
        present = {name: values[..., 1] for name, values in self.metric.per_class(sums).items()}
        return {**self.metric.compute(sums), **present}
