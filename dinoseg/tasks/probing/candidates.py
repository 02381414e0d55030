"""Linear maps of many settings scored side by side on a sample of the pixels, to choose one of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.geometry import lattice
from dinoseg.metrics.confusion import ConfusionMatrix
from dinoseg.tasks.probing.sums import Affine, reads

_PIXELS = 4096  # of an image, evenly spaced, that candidates are scored at
SHARPNESS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # factors of scores that a softmax is taken of


class Candidates:
    """Linear maps of the same features, each counted in a confusion matrix of its own.

    Args:
        maps: the candidates.
        ignore_index: pixels of it count nowhere.

    Attributes:
        counts: (candidates, K, K) int64.
        losses: (candidates, sharpness) float64, the cross-entropy of the scores times each of `SHARPNESS`, summed.
    """

    def __init__(self, maps: Sequence[Affine], ignore_index: int) -> None:
        self.ignore_index = ignore_index
        self.num_classes = len(maps[0].bias)
        self.weight = torch.cat([each.weight for each in maps]).float()  # (candidates * K, D)
        self.bias = torch.cat([each.bias for each in maps]).float()
        self.counts = torch.zeros(len(maps), self.num_classes, self.num_classes, dtype=torch.int64).to(self.bias.device)
        self.losses = torch.zeros(len(maps), len(SHARPNESS), dtype=torch.float64, device=self.bias.device)

    def add(self, features: Tensor, mask: Tensor, valid: tuple[float, float]) -> None:
        """Count maps (B, D, h, w) against masks (B, H, W)."""
        size = (mask.shape[-2], mask.shape[-1])
        places = lattice(size, _PIXELS)
        rows, columns = (
            reads(length, cells, share)[place].to(self.weight)
            for length, cells, share, place in zip(size, features.shape[-2:], valid, places, strict=True)
        )
        scores = F.conv2d(features.to(self.weight), self.weight[..., None, None], self.bias)
        chosen = (rows @ scores @ columns.T).unflatten(1, (len(self.counts), -1))  # (B, candidates, K, rows, columns)
        labels = mask[:, places[0], places[1]].long().to(self.weight.device)
        known = labels != self.ignore_index
        labels, chosen = labels[known], chosen.movedim(2, -1).movedim(1, -2)[known]  # (P,), (P, candidates, K)
        first = torch.arange(len(self.counts), device=labels.device) * self.num_classes
        bins = (first + labels[:, None]) * self.num_classes + chosen.max(dim=-1).indices
        self.counts += torch.bincount(bins.flatten(), minlength=self.counts.numel()).view_as(self.counts)
        for number, factor in enumerate(SHARPNESS):
            sharpened = factor * chosen
            right = sharpened.gather(-1, labels[:, None, None].expand(-1, len(self.counts), 1))[..., 0]
            self.losses[:, number] += (sharpened.logsumexp(dim=-1) - right).double().sum(dim=0)

    def best(self) -> "Choice":
        """Return the candidate of the highest mIoU, the first of equals."""
        scores = []
        for counts in self.counts:
            matrix = ConfusionMatrix(self.num_classes, self.ignore_index)
            matrix.matrix.copy_(counts)
            scores.append(matrix.compute()["miou"] or 0.0)
        number = max(range(len(scores)), key=scores.__getitem__)
        sharpest = int(self.losses[number].argmin())
        return Choice(number, scores[number], SHARPNESS[sharpest])


class Choice(NamedTuple):
    """Which candidate was chosen."""

    number: int
    miou: float
    sharpness: float  # by which its scores are best multiplied before a softmax
