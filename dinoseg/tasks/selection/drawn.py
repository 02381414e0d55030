"""The baseline: images drawn at random, of which no pixel is read."""

import numpy as np

from dinoseg.tasks.selection.selector import NOTHING, Known, Pick, Selector


class Drawn(Selector):
    """Images in an order that the seed alone decides: fewer of them are the first of more."""

    needs = NOTHING

    def choose(self, known: Known, count: int, seed: int) -> list[Pick]:
        """Return the first of a permutation."""
        order = np.random.default_rng(seed).permutation(known.free)
        return [Pick(int(index), f"drawn with seed {seed}") for index in order[:count]]
