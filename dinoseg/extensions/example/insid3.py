"""Steps 4 to 12 of INSID3 (arXiv 2603.28480) on features of patches, in float64.

The steps are those of the official code (visinf/INSID3, f1c9622), without its optional CRF. N is the number of patches
of the target, n that of a reference, C that of channels, M that of clusters, K that of concepts.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from dinoseg.core.sizes import Size

TAU = 0.6  # similarity above which patches and clusters are merged
ALPHA = 0.2  # score above which a cluster belongs to the concept
_INSIDE = 0.5  # share of a patch or pixel above which it belongs to a mask
_QUANTILE = 0.9  # of similarities, if none is positive
_TINY = float(np.finfo(np.float64).tiny)


class ReferencePatches(NamedTuple):
    """Reference image with masks of K concepts.

    Attributes:
        features: de-biased (n, C).
        masks: (K, n) bool, True where a patch shows the concept; a concept that the image does not show has none.
    """

    features: np.ndarray
    masks: np.ndarray


class TargetPatches(NamedTuple):
    """Image to segment, in clusters of patches.

    Attributes:
        features: de-biased (N, C).
        clusters: number of the cluster of each patch (N,), from 0 to M - 1.
        prototypes: of the clusters (M, C), de-biased.
        raw_prototypes: of the clusters (M, C), with positions.
    """

    features: np.ndarray
    clusters: np.ndarray
    prototypes: np.ndarray
    raw_prototypes: np.ndarray

    @classmethod
    def of(cls, raw: np.ndarray, features: np.ndarray, tau: float = TAU) -> Self:
        """Return the clusters of an image with normalised features (N, C), `raw` and de-biased (steps 8 and 9)."""
        clusters = find_clusters(raw, tau)
        return cls(features, clusters, average_clusters(features, clusters), average_clusters(raw, clusters))


def normalise(features: np.ndarray) -> np.ndarray:
    """Return features (..., C) divided by their L2 norms; zeros stay (end of step 4)."""
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), _TINY)


def reduce_mask(mask: np.ndarray, seen: Size, grid: Size) -> np.ndarray:
    """Return the patches (h, w) bool of a mask (H, W) bool of an image that the backbone sees at `seen` (step 5).

    An object too small for more than half of any patch has the patches whose first pixel shows it, else the patch of
    its centroid. Only an empty mask has no patch.
    """
    reduced = resize_nearest(mask, seen)
    patches = resize_bilinear(reduced, grid) > _INSIDE
    if not patches.any():
        patches = resize_nearest(reduced, grid)
    if not patches.any() and mask.any():
        centre = np.argwhere(mask).mean(0) * grid / mask.shape
        patches[tuple(centre.astype(int))] = True
    return patches


def average_shots(features: Sequence[np.ndarray]) -> np.ndarray:
    """Return the prototype (C,) of a concept from the features (m, C) of its patches in each shot (step 6).

    It is the mean of the shots' means, so that each shot counts the same.
    """
    return normalise(np.mean([each.mean(0) for each in features], axis=0))


def find_nearest(reference: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return the most similar patch of a reference (n, C) for each target patch (N,) (step 7)."""
    return (features @ reference.T).argmax(1)


def find_candidates(similarity: np.ndarray, votes: Sequence[np.ndarray]) -> np.ndarray:
    """Return the patches (N,) bool that may show the concept, found forward and backward (step 7).

    Args:
        similarity: of each patch to the prototype (N,): forward, it is positive, or of the highest tenth if none is.
        votes: of each shot (N,) bool: backward, half of the shots or more vote for the patch.
    """
    forward = similarity > 0
    if not forward.any():
        forward = similarity > np.quantile(similarity, _QUANTILE)
    return forward & (np.sum(votes, axis=0) >= math.ceil(len(votes) / 2))


def find_clusters(raw: np.ndarray, tau: float = TAU) -> np.ndarray:
    """Return the cluster of each patch (N,): average linkage of cosine distances, merged below 1 - `tau` (step 8)."""
    if len(raw) == 1:
        return np.zeros(1, int)
    distances = squareform(1 - (raw @ raw.T).clip(-1, 1), checks=False)
    below = np.nextafter(1 - tau, -np.inf)  # `fcluster` also merges at the threshold itself
    return fcluster(linkage(distances, "average"), below, "distance") - 1


def average_clusters(features: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Return the normalised mean (M, C) of the patches of each cluster (step 9)."""
    order = np.argsort(clusters, kind="stable")
    starts = np.searchsorted(clusters[order], np.arange(clusters.max() + 1))
    return normalise(np.add.reduceat(features[order], starts))


def find_seed(candidates: np.ndarray, prototype: np.ndarray, target: TargetPatches) -> int:
    """Return the cluster with a candidate whose prototype is the most similar to the concept's (step 10)."""
    matched = np.unique(target.clusters[candidates])
    return int(matched[(target.prototypes[matched] @ prototype).argmax()])


def score_clusters(candidates: np.ndarray, similarity: np.ndarray, seed: int, target: TargetPatches) -> np.ndarray:
    """Return the score (M,) of each cluster: cross-image times intra-image similarity times coverage (step 11)."""
    areas = np.bincount(target.clusters)
    cross = np.bincount(target.clusters, similarity) / areas
    intra = target.raw_prototypes @ target.raw_prototypes[seed]
    coverage = np.bincount(target.clusters, candidates) / areas
    coverage[seed] = 1
    return cross * intra * coverage


def score_patches(prototype: np.ndarray, votes: Sequence[np.ndarray], target: TargetPatches) -> np.ndarray:
    """Return the score (N,) of the cluster of each patch; all are 0 if no patch is a candidate (steps 7 to 11)."""
    similarity = target.features @ prototype
    candidates = find_candidates(similarity, votes)
    if not candidates.any():
        return np.zeros(len(candidates))
    seed = find_seed(candidates, prototype, target)
    return score_clusters(candidates, similarity, seed, target)[target.clusters]


def match(shots: Sequence[ReferencePatches], target: TargetPatches) -> np.ndarray:
    """Return the score (K, N) of each concept in each patch; a concept in no shot has the score 0 (steps 6 to 11)."""
    nearest = [find_nearest(shot.features, target.features) for shot in shots]
    scores = np.zeros((len(shots[0].masks), len(target.clusters)))
    for concept, row in enumerate(scores):
        having = [(shot.features, shot.masks[concept], near) for shot, near in zip(shots, nearest, strict=True)]
        having = [each for each in having if each[1].any()]
        if having:
            prototype = average_shots([features[mask] for features, mask, _ in having])
            row[:] = score_patches(prototype, [mask[near] for _, mask, near in having], target)
    return scores


def choose_concepts(scores: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """Return the number (N,) of the concept with the highest score (K, N) above `alpha`, from 1; 0: none (step 11).

    Equal scores go to the first concept.
    """
    return np.where(scores.max(0) > alpha, scores.argmax(0) + 1, 0)


def enlarge_ids(ids: np.ndarray, size: Size) -> np.ndarray:
    """Return ids (h, w) at `size` (H, W): at each pixel, that of the largest bilinear share (step 12).

    Of one concept, these are the pixels whose share exceeds one half. Equal shares go to the lower id.
    """
    present = np.unique(ids)
    return present[find_largest([ids == number for number in present], size)]


def find_largest(maps: Iterable[np.ndarray], size: Size) -> np.ndarray:
    """Return the index (H, W) uint8 of the largest of maps (h, w), each enlarged bilinearly to `size`.

    Equal values go to the first map.
    """
    best = np.full(size, -np.inf)
    found = np.zeros(size, np.uint8)
    for number, values in enumerate(maps):
        enlarged = resize_bilinear(values, size)
        wins = enlarged > best
        best[wins] = enlarged[wins]
        found[wins] = number
    return found


def resize_bilinear(values: np.ndarray, size: Size) -> np.ndarray:
    """Return values (h, w) at `size` (H, W), bilinear, without antialiasing, pixel centres aligned."""
    for axis, length in enumerate(size):
        count = values.shape[axis]
        position = ((np.arange(length) + 0.5) * count / length - 0.5).clip(0, count - 1)
        low = position.astype(int)
        share = np.expand_dims(position - low, 1 - axis)
        high = np.minimum(low + 1, count - 1)
        values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    return values


def resize_nearest(values: np.ndarray, size: Size) -> np.ndarray:
    """Return values (h, w) at `size` (H, W), each pixel that of the first one below it."""
    rows, columns = (np.arange(length) * side // length for length, side in zip(size, values.shape, strict=True))
    return values[rows[:, None], columns]
