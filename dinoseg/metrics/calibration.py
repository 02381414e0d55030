"""Whether a model is right as often as it is sure: reliability, expected calibration error, temperature; no torch."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

BINS = 15  # of equal width over the confidence, as C. Guo et al. (2017) take them
_SHARPEST = 100.0  # times that logits may be multiplied, or divided


@dataclass(frozen=True)
class Reliability:
    """Pixels by confidence, the greatest class probability: in bins of equal width over 0..1.

    Args:
        pixels: (BINS,) int64.
        correct: (BINS,) int64, whose class of this probability is the reference's.
        confidence: (BINS,) float64, sums.
    """

    pixels: np.ndarray
    correct: np.ndarray
    confidence: np.ndarray

    @property
    def ece(self) -> float | None:
        """The expected calibration error: gaps between confidence and accuracy, averaged over pixels; None for none."""
        total = self.pixels.sum()
        return float(np.abs(self.correct - self.confidence).sum() / total) if total else None


def reliability(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> Reliability:
    """Return how sure and how right a model is at pixels.

    Args:
        logits: (N, K).
        labels: (N,) ids below K.
        temperature: by which logits are divided.
    """
    scaled = _scaled(logits, 1 / temperature)
    confidence = 1 / np.exp(scaled).sum(axis=1)  # of the largest, which is 0
    correct = logits.argmax(axis=1) == labels
    # upper ends belong to their bin: a confidence of 1 to the last one
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    pixels = np.bincount(bins, minlength=BINS)
    hits = np.bincount(bins[correct], minlength=BINS)
    return Reliability(pixels, hits, np.bincount(bins, confidence, minlength=BINS))


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """Return the mean negative log-likelihood (nats) of labels (N,) under logits (N, K) divided by a temperature."""
    scaled = _scaled(logits, 1 / temperature)
    of_label = scaled[np.arange(len(labels)), labels]
    return float((np.log(np.exp(scaled).sum(axis=1)) - of_label).mean())


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature under which labels (N,) are likeliest, between 0.01 and 100.

    In the inverse temperature the likelihood has one maximum (C. Guo et al., 2017), which is searched there.

    Raises:
        ValueError: no pixel, or one class only: every temperature is as good.
    """
    if not len(labels) or logits.shape[1] < 2:
        raise ValueError("A temperature needs pixels of two classes or more.")
    found = minimize_scalar(
        lambda power: negative_log_likelihood(logits, labels, float(np.exp(-power))),
        bounds=(-np.log(_SHARPEST), np.log(_SHARPEST)),
        method="bounded",
        options={"xatol": 1e-5},
    )
    return float(np.exp(-found.x))


def _scaled(logits: np.ndarray, factor: float) -> np.ndarray:
    """Return logits (N, K) float64, of which the largest is 0, times a factor."""
    precise = logits.astype(np.float64)
    return factor * (precise - precise.max(axis=1, keepdims=True))
