"""Which slot is which, and which cells are whose, by what each slot looks like."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.metrics.assignment import best_assignment

_LEAST = 1e-4  # added to masks, whose logarithm is taken
_STAY = 1e-6  # what two assignments may differ by and still be taken for equal
_FAR = 1e9  # how far from all cells a slot is that has never won one


class Settled(NamedTuple):
    """A frame's slots as they are told from each other by their looks."""

    known: "Appearance"  # with this frame
    successors: Tensor  # (S,) the slot of this frame that each slot of the first one is
    masks: Tensor  # (S, h, w) float32 in the order of the first frame's slots, which sum to 1


@dataclass(frozen=True)
class Appearance:
    """The mean features of what each of the S slots of a video's first frame has won, in all frames that were seen.

    A slot that has lost its object takes another one's, where two meet or one is hidden; and this tells, as long as
    they look different, however far apart in time and place they were seen. On the CPU and in double precision.

    Args:
        sums: (S, C) of the features of the cells that each has won.
        cells: (S,) how many these are.
        moments: (2, C) sums of the features of all cells, and of their squares.
        whole: of a whole video, which was seen before: frames that are seen again change nothing.
    """

    sums: Tensor
    cells: Tensor
    moments: Tensor
    whole: bool = False

    @classmethod
    def nothing(cls, num_slots: int, width: int) -> "Appearance":
        """Return that before the first frame."""
        return cls(_zeros(num_slots, width), _zeros(num_slots), _zeros(2, width))

    def step(
        self,
        features: Tensor,
        masks: Tensor,
        valid: tuple[float, float],
        last: Tensor,
        weight: float,
        *,
        same: bool = False,
    ) -> Settled:
        """Return what is known with one more frame, which slot is which in it, and its cells' masks by that.

        Cells are won by the slot of the greatest mask, and look most like that slot of the first frame whose mean is
        the nearest. The assignment with the greatest sum of overlaps (IoU) of the two decides which slot is which, and
        between equals the last one; in a video's first frame, slots are themselves. Then a cell's score for a slot is
        the logarithm of its mask minus `weight` times the squared distance from the slot's mean, this frame's cells
        among them; by the greatest score cells count in the frames to come. The masks are a softmax of the scores,
        whose temperature is half the weight, and at least 1: they are upsampled, and harder ones would have steps.

        Distances are means over the channels, each in its standard deviation over all cells.

        Args:
            features: (C, h, w).
            masks: soft masks of this frame's slots (S, h, w).
            valid: share of the grid's height and width that the frame covers; cells beyond do not count.
            last: (S,) which slots of the last frame they were.
            weight: of looks beside masks.
            same: whether slots are what they were, however they look.
        """
        tokens, soft = features.flatten(1).T.cpu().double(), masks.flatten(1).cpu().double()  # (N, C), (S, N)
        inside = _inside((masks.shape[1], masks.shape[2]), valid)
        own, won = tokens[inside], _winners(soft[:, inside])
        moments, count = self.moments, self.cells.sum()
        if not self.whole:
            moments, count = moments + torch.stack([own.sum(0), own.square().sum(0)]), count + len(own)
        scale = _Scale.of(moments, count)
        tokens = scale(tokens)
        successors = last
        if self.cells.any() and not same:
            overlaps = _overlaps(_winners(-self._distances(tokens[inside], scale)), won)
            stays = _STAY * F.one_hot(last, len(last))
            successors = torch.from_numpy(best_assignment((overlaps + stays).numpy()))
        now = self._with(own, won[successors], moments)
        scores = (soft[successors] + _LEAST).log() - weight * now._distances(tokens, scale)
        known = self._with(own, _winners(scores[:, inside]), moments)
        settled = (scores / max(1.0, weight / 2)).softmax(0)
        return Settled(known, successors, settled.float().view_as(masks).to(masks.device))

    def _with(self, tokens: Tensor, won: Tensor, moments: Tensor) -> "Appearance":
        """Return this with the cells of one more frame (N, C), as (S, N) says who won which."""
        if self.whole:
            return self
        return Appearance(self.sums + won @ tokens, self.cells + won.sum(1), moments)

    def _distances(self, tokens: Tensor, scale: "_Scale") -> Tensor:
        """Return how far each of some scaled tokens (N, C) is from what each slot looks like (S, N), squared."""
        means = scale(self.sums / self.cells.clamp(min=1)[:, None])
        apart = torch.cdist(means, tokens).square() / tokens.shape[1]
        return apart.masked_fill(self.cells[:, None] == 0, _FAR)


class _Scale(NamedTuple):
    """Each channel's mean and standard deviation (C,)."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, moments: Tensor, count: Tensor) -> "_Scale":
        """Return those of so many cells, by the sums of their features and of the squares."""
        mean, square = moments / count
        variance = square - mean.square()
        return cls(mean, torch.where(variance > 0, variance, torch.inf).sqrt())

    def __call__(self, features: Tensor) -> Tensor:
        """Return features (N, C) with mean 0 and variance 1 over all cells; those of a constant channel are about 0."""
        return (features - self.mean) / self.deviation


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _inside(grid: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return which cells (h * w,) of a grid the frame covers."""
    rows, columns = (
        torch.arange(length) < max(1, round(share * length)) for length, share in zip(grid, valid, strict=True)
    )
    return (rows[:, None] & columns).flatten()


def _winners(scores: Tensor) -> Tensor:
    """Return 1 for the slot with the greatest of scores (S, N), and 0 for the others."""
    return F.one_hot(scores.argmax(0), len(scores)).T.double()


def _overlaps(one: Tensor, other: Tensor) -> Tensor:
    """Return the intersection over union (S, S) of each of some segments (S, N) of zeros and ones with each other."""
    both = one @ other.T
    return both / (one.sum(1)[:, None] + other.sum(1) - both).clamp(min=1)
