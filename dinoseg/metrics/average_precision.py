"""Average precision of each class, from counts in bins of its probability; no torch."""

import numpy as np

from dinoseg.core.metric import BINS, Counts, LabelledImage, Metric, PredictedImage, check_image
from dinoseg.metrics.counts import mean_defined, ratio


class AveragePrecision(Metric):
    """Mean over the classes of the average precision of their pixels, each class against all others.

    It is the sum over thresholds of precision times the gain in recall, without interpolation, as in scikit-learn. The
    thresholds are the lower edges of 1,024 equal bins of the probability: pixels of one bin are ties. Counts are exact,
    over all labelled pixels of all images. A class without a positive pixel is undefined.

    Examples:
        >>> import numpy as np
        >>> from dinoseg.metrics import AveragePrecision, LabelledImage, PredictedImage
        >>> ids = np.array([[0, 1]])
        >>> prediction = PredictedImage(ids, bins=np.array([[[900, 100]], [[123, 923]]], np.int16))
        >>> metric = AveragePrecision()
        >>> metric.score([metric.count(prediction, LabelledImage(ids, num_classes=2))])
        {'average_precision': 1.0}
    """

    scores = {"average_precision": "max"}
    needs_bins = True

    def count(self, prediction: PredictedImage, sample: LabelledImage) -> Counts:
        """Return the positive pixels and all labelled pixels of each class by bin, (K, 1024) int64 each."""
        assert prediction.bins is not None
        check_image(prediction, sample)
        present = 1 if sample.mask.ndim > 2 else np.arange(sample.num_classes)[:, None, None]
        labelled = np.broadcast_to(sample.mask != sample.ignore_index, prediction.bins.shape)
        positive = (sample.mask == present) & labelled
        return {"positives": _count_bins(prediction.bins, positive), "totals": _count_bins(prediction.bins, labelled)}

    def compute(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return the mean over the classes of their average precision."""
        return {"average_precision": mean_defined(self.per_class(sums)["average_precision"])}

    def per_class(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return the average precision of each class."""
        hits, predicted = sum_from_above(sums["positives"]), sum_from_above(sums["totals"])
        # sum_n (R_n - R_(n-1)) P_n: the recall gained by a bin is its share of all positives
        gained = sums["positives"] * np.nan_to_num(ratio(hits, predicted))
        return {"average_precision": ratio(gained.sum(-1), hits[..., 0])}


def _count_bins(bins: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(each[chosen], minlength=BINS) for each, chosen in zip(bins, pixels, strict=True)])


def sum_from_above(counts: np.ndarray) -> np.ndarray:
    """Return the sums over each bin (..., 1024) and all higher ones: the pixels that its lower edge predicts."""
    return counts[..., ::-1].cumsum(axis=-1)[..., ::-1]
