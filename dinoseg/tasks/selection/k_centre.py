"""Greedy k-centre: each chosen image is the farthest from all labelled or chosen images."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dinoseg.tasks.selection.selector import Known, Pick, Selector


class Farthest(NamedTuple):
    """Image, its distance to the nearest earlier one, and which one that is; None for the first of all."""

    position: int
    distance: float
    nearest: int | None


def farthest_first(features: np.ndarray, centres: Sequence[int], among: np.ndarray) -> Iterator[Farthest]:
    """Yield each of the images `among` (n,) once: the farthest from all centres and from those before it.

    The largest distance to the nearest centre is thereby at most twice the optimum (Gonzalez, 1985; for choosing images
    to label: Sener and Savarese, arXiv 1708.00489). Without centres, the image nearest to the mean comes first.

    Args:
        features: (N, D).
        centres: indices of the initial centres.
        among: indices to choose from, in order; ties go to the first.
    """
    distance, nearest = np.full(len(among), np.inf), np.full(len(among), -1)
    rest = np.ones(len(among), dtype=bool)
    for centre in centres:
        _reach(distance, nearest, features, among, centre)
    for _ in range(len(among)):
        if nearest[0] < 0:
            at = int(np.argmin(_squares(features[among], features[among].mean(axis=0))))
        else:
            at = int(np.argmax(np.where(rest, distance, -1.0)))
        near = int(nearest[at])
        yield Farthest(int(among[at]), float(np.sqrt(distance[at])), near if near >= 0 else None)
        rest[at] = False
        _reach(distance, nearest, features, among, int(among[at]))


class KCentre(Selector):
    """Images that cover the pool: no other image is far from all of them."""

    def choose(self, known: Known, count: int, seed: int) -> list[Pick]:
        """Return the first of `farthest_first`, starting from the labelled images; `seed` is not used."""
        order = farthest_first(known.features, known.labelled, known.free)
        return [
            Pick(found.position, reason_of(found, known.names)) for _, found in zip(range(count), order, strict=False)
        ]


def reason_of(found: Farthest, names: Sequence[str]) -> str:
    """Return the reason for choosing an image."""
    if found.nearest is None:
        return "nearest to the mean of all"
    return f"{found.distance:.3f} from {names[found.nearest]}, the nearest that is labelled or chosen"


def _reach(distance: np.ndarray, nearest: np.ndarray, features: np.ndarray, among: np.ndarray, centre: int) -> None:
    """Add a centre: update the squared distances (n,) and the nearest centres in place."""
    squares = _squares(features[among], features[centre])
    nearest[squares < distance] = centre
    np.minimum(distance, squares, out=distance)


def _squares(features: np.ndarray, point: np.ndarray) -> np.ndarray:
    return ((features - point) ** 2).sum(axis=1)
