"""Appearance model of slots: assigns slots to those of the first frame, and cells to slots, by mean features."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.extensions.tracking.grid.assignment import best_assignment

_MIN = 1e-4  # added to masks before the logarithm
_STAY = 1e-6  # tolerance within which two assignments count as equal
_FAR = 1e9  # distance to a slot that has never won a cell


class AppearanceUpdate(NamedTuple):
    """Result of one frame: updated appearance, slot assignment and masks."""

    known: "Appearance"  # including this frame
    successors: Tensor  # (S,) this frame's slot for each slot of the first frame
    masks: Tensor  # (S, h, w) float32 in the order of the first frame's slots; sums to 1 over S


@dataclass(frozen=True)
class Appearance:
    """Mean features of the cells that each of the S slots of the first frame has won in all frames so far.

    When objects meet or one is hidden, a slot may switch to another object. The mean features detect this if the
    objects look different, whatever their distance in time and space. Computed on the CPU in double precision.

    Args:
        sums: (S, C) sums of the features of the cells that each slot has won.
        cells: (S,) number of these cells.
        moments: (2, C) sums of the features of all cells, and of their squares.
        whole: whether this covers the whole video, from a first pass; it is then no longer updated.
    """

    sums: Tensor
    cells: Tensor
    moments: Tensor
    whole: bool = False

    @classmethod
    def empty(cls, num_slots: int, width: int) -> "Appearance":
        """Return the empty appearance before the first frame."""
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
    ) -> AppearanceUpdate:
        """Add a frame, assign its slots to those of the first frame, and compute its masks.

        A cell is won by the slot with the highest mask; it also has a nearest slot of the first frame by mean features.
        The assignment maximises the summed IoU between the two partitions; ties keep the previous assignment. Before
        any cell is won, as in the first frame, and with `same`, the assignment is `last`.

        A cell's score for a slot is the log of its mask minus `weight` times the squared distance to the slot's mean,
        which includes this frame's cells. The highest score decides which slot a cell counts for in later frames. The
        masks are a softmax of the scores at temperature max(1, weight / 2): they are upsampled, and sharper ones would
        show steps.

        Distances are means over the channels, each divided by its standard deviation over all cells.

        Args:
            features: (C, h, w).
            masks: soft masks of this frame's slots (S, h, w).
            valid: fraction of the grid's height and width that the frame covers; cells beyond are ignored.
            last: (S,) assignment of the previous frame.
            weight: weight of the appearance relative to the masks.
            same: whether to keep the assignment regardless of appearance.
        """
        tokens, soft = features.flatten(1).T.cpu().double(), masks.flatten(1).cpu().double()  # (N, C), (S, N)
        inside = _inside((masks.shape[1], masks.shape[2]), valid)
        valid_tokens, won = tokens[inside], _winners(soft[:, inside])
        moments, count = self.moments, self.cells.sum()
        if not self.whole:
            moments, count = (
                moments + torch.stack([valid_tokens.sum(0), valid_tokens.square().sum(0)]),
                count + len(valid_tokens),
            )
        # of all cells so far, so that the channels of greatest magnitude do not decide the distances
        scale = _Scale.of(moments, count)
        tokens = scale(tokens)
        successors = last
        if self.cells.any() and not same:
            # two partitions of one frame: by mean features, in the first frame's slots, and by masks, in this frame's
            overlaps = _overlaps(_winners(-self._distances(tokens[inside], scale)), won)
            stays = _STAY * F.one_hot(last, len(last))
            successors = torch.from_numpy(best_assignment((overlaps + stays).numpy()))
        # by masks first: a first frame has no means to compare with
        now = self._with(valid_tokens, won[successors], moments)
        # log of the mask as a prior times a Gaussian of variance 1 / (2 weight) around the slot's mean
        scores = (soft[successors] + _MIN).log() - weight * now._distances(tokens, scale)
        # from `self`, not from `now`: a cell counts once, for the slot of its highest score
        known = self._with(valid_tokens, _winners(scores[:, inside]), moments)
        settled = (scores / max(1.0, weight / 2)).softmax(0)
        return AppearanceUpdate(known, successors, settled.float().view_as(masks).to(masks.device))

    def _with(self, tokens: Tensor, won: Tensor, moments: Tensor) -> "Appearance":
        """Return the appearance updated by one frame's tokens (N, C); `won` (S, N) is 1 where a slot won a cell."""
        if self.whole:
            return self
        return Appearance(self.sums + won @ tokens, self.cells + won.sum(1), moments)

    def _distances(self, tokens: Tensor, scale: "_Scale") -> Tensor:
        """Return the squared distances (S, N) of scaled tokens (N, C) to each slot's mean features."""
        means = scale(self.sums / self.cells.clamp(min=1)[:, None])
        distances = torch.cdist(means, tokens).square() / tokens.shape[1]
        return distances.masked_fill(self.cells[:, None] == 0, _FAR)


class _Scale(NamedTuple):
    """Mean and standard deviation of each channel (C,)."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, moments: Tensor, count: Tensor) -> "_Scale":
        """Return mean and deviation of `count` cells from the sums of their features and squares."""
        mean, square = moments / count
        # E[x^2] - E[x]^2, whose sums grow with each frame; in double precision, since the difference cancels digits
        variance = square - mean.square()
        return cls(mean, torch.where(variance > 0, variance, torch.inf).sqrt())

    def __call__(self, features: Tensor) -> Tensor:
        """Standardise features (N, C) to mean 0 and variance 1 over all cells; constant channels become about 0."""
        return (features - self.mean) / self.deviation


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _inside(grid: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return a mask (h * w,) of the cells that the frame covers."""
    rows, columns = (
        torch.arange(length) < max(1, round(share * length)) for length, share in zip(grid, valid, strict=True)
    )
    return (rows[:, None] & columns).flatten()


def _winners(scores: Tensor) -> Tensor:
    """Return a one-hot encoding (S, N) of the slot with the highest score in each column of `scores` (S, N)."""
    return F.one_hot(scores.argmax(0), len(scores)).T.double()


def _overlaps(one: Tensor, other: Tensor) -> Tensor:
    """Return the pairwise intersection over union (S, S) of two sets of binary segments (S, N)."""
    both = one @ other.T
    return both / (one.sum(1)[:, None] + other.sum(1) - both).clamp(min=1)
