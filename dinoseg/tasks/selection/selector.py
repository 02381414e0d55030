"""What chooses the images to label next: the contract of what `cfg/selection` chooses from."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np

NOTHING, FEATURES, DOUBTS = "nothing", "features", "doubts"  # what a selector asks of the images


class Pick(NamedTuple):
    """An image that was chosen, and why."""

    place: int
    reason: str


@dataclass(frozen=True)
class Known:
    """What is known of the images to choose from, in their order.

    Args:
        names: of all N.
        labelled: indices of those that are labelled already.
        features: (N, D) float64, of unit length; of width 0 where none were asked for.
        doubts: (N, 2) float64 in 0..1: mean entropy and mean margin of a model's classes; None: there is no model.
    """

    names: Sequence[str]
    labelled: Sequence[int]
    features: np.ndarray
    doubts: np.ndarray | None = None

    @cached_property
    def free(self) -> np.ndarray:
        """Return the indices of those that are not labelled, in order."""
        return np.setdiff1d(np.arange(len(self.names)), np.asarray(self.labelled, dtype=int))


class Selector(ABC):
    """A way to choose; of images that are equal to it, it takes the first.

    Attributes:
        needs: what it asks of the images: nothing, features, or a model's doubts beside.
    """

    needs: ClassVar[str] = FEATURES

    @abstractmethod
    def choose(self, known: Known, count: int, seed: int) -> list[Pick]:
        """Return `count` images that are not labelled, at most as many as there are, the most useful first."""
