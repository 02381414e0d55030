"""TypiClust: the most typical image of each cluster without labelled images; there is a cluster per wanted image."""

import numpy as np

from dinoseg.tasks.selection.selector import Known, Pick, Selector
from dinoseg.utils.ranges import Count

_STARTS = 10  # runs of k-means; the one with the smallest distances is used
_ROUNDS = 100  # maximum iterations of Lloyd's algorithm


class Typical(Selector):
    """Densest image of each cluster (Hacohen et al., arXiv 2202.02794), for data with hardly any labels.

    The number of clusters is that of labelled and wanted images. Clusters with the fewest labelled or chosen images
    come first, larger before smaller ones. Each contributes its most typical image: the one with the highest inverse of
    the mean distance to its nearest neighbours in the cluster. Clusters below 5 images, which the paper drops, are not
    dropped: they come last among those with equally many labelled or chosen images.

    Args:
        neighbours: maximum number of neighbours in the mean distance.
    """

    def __init__(self, neighbours: Count = 20) -> None:
        self.neighbours = neighbours

    def choose(self, known: Known, count: int, seed: int) -> list[Pick]:
        """Return images by clusters, which `seed` initialises."""
        cluster = k_means(known.features, len(known.labelled) + count, seed)
        sizes = np.bincount(cluster)
        order = {each: self._by_typicality(known, cluster, each) for each in np.unique(cluster[known.free]).tolist()}
        taken = np.bincount(cluster[np.asarray(known.labelled, dtype=int)], minlength=len(sizes))
        picks: list[Pick] = []
        while len(picks) < count:
            each = min(order, key=lambda number: (taken[number], -sizes[number], number))
            index = order[each].pop(0)
            before = f", {taken[each]} of it chosen before" if taken[each] else ""
            picks.append(Pick(index, f"the most typical remaining image of a cluster of {sizes[each]}{before}"))
            taken[each] += 1
            if not order[each]:
                del order[each]
        return picks

    def _by_typicality(self, known: Known, cluster: np.ndarray, each: int) -> list[int]:
        """Return the unlabelled images of a cluster, the most typical first, ties in their order."""
        members = np.flatnonzero(cluster == each)
        points = known.features[members]
        nearest = min(self.neighbours, len(members) - 1)
        apart = np.array([np.sort(((points - point) ** 2).sum(axis=1))[1 : nearest + 1] for point in points])
        mean = np.sqrt(apart).mean(axis=1) if nearest else np.zeros(1)
        ordered = members[np.argsort(mean, kind="stable")]
        return ordered[np.isin(ordered, known.free)].tolist()


def k_means(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return the cluster (N,) of each point (N, D): k-means++ (Arthur and Vassilvitskii, 2007), then Lloyd's algorithm.

    The result is the best of several starts. There are at most `count` clusters, fewer if fewer points differ.
    """
    draw = np.random.default_rng(seed)
    found = [_from_a_start(features, count, draw) for _ in range(_STARTS)]
    return np.unique(min(found, key=lambda each: each[1])[0], return_inverse=True)[1]


def _from_a_start(features: np.ndarray, count: int, draw: np.random.Generator) -> tuple[np.ndarray, float]:
    """Return clusters (N,), and the sum of the squared distances to their centres."""
    centres = features[[draw.integers(len(features))]]  # a copy, since centres move
    distance = ((features - centres[0]) ** 2).sum(axis=1)
    while len(centres) < count and distance.any():
        centres = np.vstack([centres, features[draw.choice(len(features), p=distance / distance.sum())]])
        distance = np.minimum(distance, ((features - centres[-1]) ** 2).sum(axis=1))
    cluster = _nearest(features, centres)
    for _ in range(_ROUNDS):
        for each in np.unique(cluster):  # a centre without points does not move
            centres[each] = features[cluster == each].mean(axis=0)
        before, cluster = cluster, _nearest(features, centres)
        if (before == cluster).all():
            break
    return cluster, float(((features - centres[cluster]) ** 2).sum())


def _nearest(features: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return np.argmin((centres**2).sum(axis=1) - 2 * features @ centres.T, axis=1)
