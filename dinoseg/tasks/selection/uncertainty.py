"""Selection by uncertainty and diversity: the most uncertain images, then k-centre among them."""

import numpy as np

from dinoseg.tasks.selection.k_centre import farthest_first, reason_of
from dinoseg.tasks.selection.selector import DOUBTS, Known, Pick, Selector
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count

MEASURES = ("entropy", "margin")  # columns of `Known.uncertainty`


class Uncertainty(Selector):
    """Uncertain images that differ (the two steps of Yang et al., arXiv 1706.04737).

    Args:
        measure: `entropy` of the class probabilities, divided by its maximum, or `margin`: 1 minus the lead of the best
            class over the second; both are means over the image.
        candidates: number of the most uncertain images to choose among, as a multiple of the wanted number; 1: only the
            most uncertain ones, however similar.

    Raises:
        UserError: the measure is unknown.
    """

    needs = DOUBTS

    def __init__(self, measure: str = "entropy", candidates: Count = 4) -> None:
        if measure not in MEASURES:
            raise UserError(f"selection.measure={measure} is unknown. Choose one of {', '.join(MEASURES)}.")
        self.measure, self.candidates = measure, candidates

    def choose(self, known: Known, count: int, seed: int) -> list[Pick]:
        """Return the first of `farthest_first` among the most uncertain images; `seed` is not used."""
        assert known.uncertainty is not None
        doubt = known.uncertainty[:, MEASURES.index(self.measure)]
        ranked = known.free[np.argsort(-doubt[known.free], kind="stable")]
        rank = {int(index): position for position, index in enumerate(ranked, start=1)}
        among = ranked[: self.candidates * count]
        first = [] if known.labelled else [int(among[0])]  # the most uncertain of all
        reasons = {index: "the most uncertain" for index in first}
        rest = farthest_first(known.features, [*known.labelled, *first], np.setdiff1d(among, first))
        for _, found in zip(range(count - len(first)), rest, strict=False):
            reasons[found.position] = reason_of(found, known.names)
        return [
            Pick(index, f"{self.measure} {doubt[index]:.3f}, rank {rank[index]} of {len(ranked)}; {why}")
            for index, why in reasons.items()
        ]
