"""Calibration of class probabilities: reliability, expected calibration error and temperature; no torch."""

from dataclasses import dataclass

import numpy as np

from dinoseg.core.metric import Counts, LabelledImage, Metric, PredictedImage, check_image
from dinoseg.metrics.counts import ratio

BINS = 15  # equal-width bins over the confidence, as in C. Guo et al. (2017)
_SHARPEST = 100.0  # greatest factor or divisor of the logits


@dataclass(frozen=True)
class Reliability:
    """Pixel counts by confidence (the greatest class probability), in bins of equal width over 0..1.

    Args:
        pixels: (BINS,) int64.
        correct: (BINS,) int64, pixels whose most probable class is the reference's.
        confidence: (BINS,) float64, sums of the confidence.
    """

    pixels: np.ndarray
    correct: np.ndarray
    confidence: np.ndarray

    @property
    def ece(self) -> float | None:
        """Return the expected calibration error; None without pixels.

        It is the gap between confidence and accuracy in each bin, averaged over the bins, weighted by pixels.
        """
        total = self.pixels.sum()
        # sum_b n_b / n |accuracy_b - confidence_b|, where the pixels n_b of a bin cancel
        return float(np.abs(self.correct - self.confidence).sum() / total) if total else None


class CalibrationError(Metric):
    """Expected calibration error (C. Guo et al., 2017) over 15 bins of the confidence, pooled over images.

    It is computed at the pixels whose logits are given: in validation and evaluation evenly spaced ones, as many as
    `geometry.lattice` has.

    Examples:
        >>> import numpy as np
        >>> from dinoseg.metrics import CalibrationError, LabelledImage, PredictedImage
        >>> ids, logits = np.zeros((4, 4), np.uint8), np.zeros((2, 4, 4), np.float32)
        >>> metric = CalibrationError()
        >>> metric.score([metric.count(PredictedImage(ids, logits), LabelledImage(ids, num_classes=2))])
        {'ece': 0.5}
    """

    scores = {"ece": "min"}
    needs_logits = True

    def count(self, prediction: PredictedImage, sample: LabelledImage) -> Counts:
        """Return correct pixels (BINS,) int64, sums of the confidence (BINS,) float64, and the number of pixels."""
        assert prediction.logits is not None
        check_image(prediction, sample)
        labels = sample.mask[prediction.places]
        known = labels != sample.ignore_index
        found = reliability(prediction.logits[:, known].T, labels[known])
        return {"correct": found.correct, "confidence": found.confidence, "pixels": found.pixels.sum()}

    def compute(self, sums: Counts) -> dict[str, np.ndarray]:
        """Return the gap between confidence and accuracy, averaged over the bins, weighted by pixels."""
        gaps = np.abs(sums["correct"] - sums["confidence"])
        return {"ece": ratio(gaps.sum(-1), sums["pixels"])}


def reliability(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> Reliability:
    """Return confidence and accuracy of a model at labelled pixels, by bins of the confidence.

    Args:
        logits: (N, K).
        labels: (N,) ids below K.
        temperature: divisor of the logits.
    """
    scaled = _scale_logits(logits, 1 / temperature)
    # the probability of the largest logit, which is shifted to 0
    confidence = 1 / np.exp(scaled).sum(axis=1)
    correct = logits.argmax(axis=1) == labels
    # bins include their upper end, so a confidence of 1 is in the last one
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    pixels = np.bincount(bins, minlength=BINS)
    hits = np.bincount(bins[correct], minlength=BINS)
    return Reliability(pixels, hits, np.bincount(bins, confidence, minlength=BINS))


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """Return the mean negative log-likelihood (nats) of labels (N,) under logits (N, K) divided by a temperature."""
    scaled = _scale_logits(logits, 1 / temperature)
    of_label = scaled[np.arange(len(labels)), labels]
    return float((np.log(np.exp(scaled).sum(axis=1)) - of_label).mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature in 0.01..100 that maximises the likelihood of labels (N,).

    The likelihood has a single maximum in the inverse temperature (C. Guo et al., 2017), so a bounded search finds it.

    Raises:
        ValueError: there are no pixels, or there is only one class: every temperature is equally good.
    """
    if not len(labels) or logits.shape[1] < 2:
        raise ValueError("A temperature needs pixels of two classes or more.")
    from scipy.optimize import minimize_scalar  # lazy: no step of a training needs it

    found = minimize_scalar(
        # searched in log(1 / T), so that factors and divisors of the logits are treated alike
        lambda power: negative_log_likelihood(logits, labels, float(np.exp(-power))),
        bounds=(-np.log(_SHARPEST), np.log(_SHARPEST)),
        method="bounded",
        options={"xatol": 1e-5},
    )
    return float(np.exp(-found.x))


def _scale_logits(logits: np.ndarray, factor: float) -> np.ndarray:
    """Return logits (N, K) as float64, shifted to a maximum of 0 and multiplied by a factor."""
    precise = logits.astype(np.float64)
    return factor * (precise - precise.max(axis=1, keepdims=True))
