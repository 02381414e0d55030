"""Random selection of images: the baseline, which reads no pixels."""

import numpy as np

from dinoseg.tasks.selection.selector import NOTHING, Known, Pick, Selector


class RandomOrder(Selector):
    """Images in a random order that only the seed decides: a smaller selection is the beginning of a larger one."""

    needs = NOTHING

    def choose(self, known: Known, count: int, seed: int) -> list[Pick]:
        """Return the first images of a random permutation."""
        order = np.random.default_rng(seed).permutation(known.free)
        return [Pick(int(index), f"sampled with seed {seed}") for index in order[:count]]
