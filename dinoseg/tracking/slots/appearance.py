"""Which slot is which by appearance: each is taken for what it has looked like in all frames so far."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.metrics.assignment import best_assignment

_SIZE = 0.2  # what a size e times another one counts, where 1 is how far apart two slots look on average
_STAY = 1e-6  # what two assignments may differ by and still be taken for equal


@dataclass(frozen=True)
class Appearance:
    """What the S slots of a video's first frame have won of all frames so far: as it looks, and how much.

    A slot that has lost its object takes another one's, where two meet or one is hidden; and this tells, as long as
    they look different, however far apart in time and place they were seen. On the CPU and in double precision.

    Args:
        sums: (S, C) of the features of the cells that each has won.
        cells: (S,) how many these are.
        moments: (2, C) sums of the features of all cells, and of their squares.
        frames: how many frames these were.
    """

    sums: Tensor
    cells: Tensor
    moments: Tensor
    frames: int

    @classmethod
    def start(cls, features: Tensor, masks: Tensor, valid: tuple[float, float]) -> "Appearance":
        """Return that of a first frame, see `step`."""
        num_slots, width = len(masks), len(features)
        nothing = cls(_zeros(num_slots, width), _zeros(num_slots), _zeros(2, width), 0)
        return nothing._with(_Won.of(features, masks, valid), torch.arange(num_slots))

    def step(
        self, features: Tensor, masks: Tensor, valid: tuple[float, float], last: Tensor
    ) -> tuple["Appearance", Tensor]:
        """Return what is known with one more frame, and the slot (S,) of it that each slot of the first one is.

        A cell is won by the slot of the greatest mask. Two slots are as far apart as their mean features are, each
        channel in its standard deviation over all cells so far, and in the mean distance of the slots so far; plus a
        fifth of the logarithm by which they differ in size, one cell added to both. The assignment of least sum
        decides, and between equals the last one.

        Args:
            features: (C, h, w).
            masks: soft masks of this frame's slots (S, h, w).
            valid: share of the grid's height and width that the frame covers; cells beyond do not count.
            last: (S,) which slots of the last frame they were.
        """
        won = _Won.of(features, masks, valid)
        known, seen = self.cells > 0, won.cells > 0
        total = self.moments + won.moments
        deviation = _deviation(total, self.cells.sum() + won.cells.sum())
        before, now = _means(self.sums, self.cells) / deviation, _means(won.sums, won.cells) / deviation
        unlike = torch.cdist(before, now) / _mean_distance(before[known])
        unlike[~known], unlike[:, ~seen] = 1.0, 1.0  # nothing is known of these: as far apart as any two
        larger = ((self.cells[:, None] / self.frames + 1) / (won.cells + 1)).log().abs()
        scores = _STAY * F.one_hot(last, len(last)) - unlike - _SIZE * larger
        successors = torch.from_numpy(best_assignment(scores.numpy()))
        return self._with(won, successors), successors

    def _with(self, won: "_Won", successors: Tensor) -> "Appearance":
        return Appearance(
            sums=self.sums + won.sums[successors],
            cells=self.cells + won.cells[successors],
            moments=self.moments + won.moments,
            frames=self.frames + 1,
        )


@dataclass(frozen=True)
class _Won:
    """What the slots of one frame have won, see `Appearance`."""

    sums: Tensor
    cells: Tensor
    moments: Tensor

    @classmethod
    def of(cls, features: Tensor, masks: Tensor, valid: tuple[float, float]) -> "_Won":
        rows, columns = (
            torch.arange(length) < max(1, round(share * length))
            for length, share in zip(masks.shape[1:], valid, strict=True)
        )
        inside = (rows[:, None] & columns).flatten()
        tokens = features.flatten(1).T.cpu().double()[inside]  # (N, C)
        winner = F.one_hot(masks.argmax(0).flatten().cpu()[inside], len(masks)).double()  # (N, S)
        return cls(winner.T @ tokens, winner.sum(0), torch.stack([tokens.sum(0), tokens.square().sum(0)]))


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def _means(sums: Tensor, cells: Tensor) -> Tensor:
    """Return the mean features (S, C); zeros where no cell was won."""
    return sums / cells.clamp(min=1)[:, None]


def _deviation(moments: Tensor, cells: Tensor) -> Tensor:
    """Return the standard deviation (C,) of each channel; 1 where it is constant, and nothing differs."""
    mean, square = moments / cells
    variance = square - mean.square()
    return torch.where(variance > 0, variance, 1.0).sqrt()


def _mean_distance(means: Tensor) -> Tensor:
    """Return the mean Euclidean distance between two of some vectors (K, C); 1 where none differ."""
    mean = torch.pdist(means).mean()  # NaN of none
    return torch.where(mean > 0, mean, 1.0)
