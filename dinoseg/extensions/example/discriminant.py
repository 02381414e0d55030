"""Linear discriminant analysis of patches: classes and background of the references compete, in float64."""

from collections.abc import Sequence

import numpy as np

from dinoseg.extensions.example.insid3 import ReferencePatches

SHRINKAGE = 0.5  # towards a sphere; the mean mIoU of 0.3 to 0.8 was within one point (docs/decisions.md)
_FLOOR = 1e-6  # variance of features that are equal within each class


class Discriminant:
    """Linear discriminant analysis with equal priors and a shrunken covariance, fitted to the patches of references.

    A class has the mean of its patches; all classes share the mean of their covariances, shrunken towards a multiple
    of the identity (J. H. Friedman, Regularized discriminant analysis, 1989). Fully shrunken, it is the nearest mean.

    Args:
        shots: references with masks (R, n) of the background and the concepts.

    Attributes:
        classes: numbers of the rows of masks (S,) that show a patch; others are never found.
    """

    def __init__(self, shots: Sequence[ReferencePatches]) -> None:
        features = np.concatenate([shot.features for shot in shots])
        masks = np.concatenate([shot.masks for shot in shots], axis=1)
        self.classes = np.flatnonzero(masks.any(1)).astype(np.uint8)
        groups = [features[mask] for mask in masks[self.classes]]
        means = np.stack([group.mean(0) for group in groups])
        covariance = np.mean([np.cov(group.T, bias=True) for group in groups], axis=0)
        variance = max(np.trace(covariance) / len(covariance), _FLOOR)
        shrunken = (1 - SHRINKAGE) * covariance + SHRINKAGE * variance * np.eye(len(covariance))
        self._weight = np.linalg.solve(shrunken, means.T).T  # (S, C)
        self._bias = -(self._weight * means).sum(1) / 2

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return the discriminants (S, N) of patches (N, C), log-likelihoods up to a constant of the patch."""
        return self._weight @ features.T + self._bias[:, None]


def share_likelihoods(values: np.ndarray) -> np.ndarray:
    """Return the posterior probabilities (S, N) of discriminants (S, N)."""
    likelihoods = np.exp(values - values.max(0))
    return likelihoods / likelihoods.sum(0)
