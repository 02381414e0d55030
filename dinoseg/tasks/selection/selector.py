"""Base class of selectors, which choose the images to label next; implementations are in `cfg/selection`."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import numpy as np

NOTHING, FEATURES, DOUBTS = "nothing", "features", "doubts"  # what a selector needs of the images


class Pick(NamedTuple):
    """Chosen image, and the reason."""

    position: int
    reason: str


@dataclass(frozen=True)
class Known:
    """Information on the images to choose from, in their order.

    Args:
        names: names of all N images.
        labelled: indices of the images that are already labelled.
        features: (N, D) float64, of unit length; of width 0 if the selector needs none.
        doubts: (N, 2) float64 in 0..1: mean normalised entropy, and mean 1 - margin, of a model's classes; None: no
            model.
    """

    names: Sequence[str]
    labelled: Sequence[int]
    features: np.ndarray
    uncertainty: np.ndarray | None = None

    @cached_property
    def free(self) -> np.ndarray:
        """Return the indices of the unlabelled images, in order."""
        return np.setdiff1d(np.arange(len(self.names)), np.asarray(self.labelled, dtype=int))


class Selector(ABC):
    """Base class of selectors; ties go to the first image.

    Attributes:
        needs: required information on the images: nothing, features, or features and a model's uncertainty.
    """

    needs: ClassVar[str] = FEATURES

    @abstractmethod
    def choose(self, known: Known, count: int, seed: int) -> list[Pick]:
        """Return `count` unlabelled images, the most useful first; there must be at least `count` of them."""
