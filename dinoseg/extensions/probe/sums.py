"""Sums over labelled pixels, stored on the grid, from which linear maps to class scores are solved.

A linear head scores a pixel from the features of the four cells around it, with the weights of `geometry.upsample`.
Thus x_p = sum_t u_pt x_t, since a linear map and bilinear upsampling commute. The sums over pixels of x_p x_p' and
x_p y_p' are X' A X and X' T, with A_ts = sum_p w_p u_pt u_ps and T_tk = sum of u_pt over the pixels of class k. This is
exact, and no feature is upsampled to full size. A couples each cell only with its eight neighbours.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.geometry import spans
from dinoseg.utils.errors import UserError


class CellLabels(NamedTuple):
    """Labelled pixels of a batch, aggregated over the cells that they read; cells are ordered by image, then by row."""

    shares: Tensor  # (cells, K) float64: pixels of each class, weighted by how much they read the cell
    coupling: Tensor  # (S, 5, cells) float64: coupling of a cell with itself and later cells, by weighting
    steps: tuple[int, ...]  # offset in cells of each of the five


def cell_labels(
    mask: Tensor, weightings: Tensor, ignore_index: int, grid: tuple[int, int], valid: tuple[float, float]
) -> CellLabels:
    """Return the labels of a batch, aggregated over the cells that its pixels read.

    Args:
        mask: (B, H, W) integer.
        weightings: (S, K) float64, a weight for the pixels of each class in each of S weightings.
        ignore_index: label of pixels that are not counted.
        grid: (h, w) of the feature maps.
        valid: share of the grid that the image covers, as for `geometry.upsample`.

    Raises:
        UserError: a mask holds an ID that is neither a class nor ignored.
    """
    count, num_classes = weightings.shape
    rows, columns = (
        reads(length, cells, share).to(mask.device)
        for length, cells, share in zip(mask.shape[-2:], grid, valid, strict=True)
    )
    right, below = _next(columns) * columns, _next(rows) * rows
    shares = torch.zeros(len(mask), *grid, num_classes, dtype=torch.float64, device=mask.device)
    weights = torch.zeros(count, *mask.shape, dtype=torch.float64, device=mask.device)
    for present in mask.unique().tolist():
        if present == ignore_index:
            continue
        if not 0 <= present < num_classes:
            raise UserError(
                f"A mask holds the id {present}, which is neither one of the classes 0..{num_classes - 1} nor the "
                f"ignore index {ignore_index}. Correct the masks, data.classes or data.ignore_index."
            )
        pixels = (mask == present).double()
        shares[..., present] = rows.T @ pixels @ columns
        weights += weightings[:, present, None, None, None] * pixels
    square, sloped = (rows**2).T @ weights, below.T @ weights  # (S, B, h, W)
    corner = sloped @ right
    parts = (square @ columns**2 / 2, square @ right, F.pad(corner, (1, -1)), sloped @ columns**2, corner)
    coupling = torch.stack(parts, dim=1)  # (S, 5, B, h, w)
    return CellLabels(shares.flatten(0, 2), coupling.flatten(2), (0, 1, grid[1] - 1, grid[1], grid[1] + 1))


class Sums:
    """Sums over images of the features that a linear map reads, in float64.

    Args:
        dim: D, width of the features.
        weightings: (S, K) float64, see `cell_labels`.

    Attributes:
        gram: (S, D + 1, D + 1), weighted sum of x_p x_p', for features with an appended 1.
        cross: (D + 1, K), unweighted sum of x_p over the pixels of each class.
        cells: (2, D + 1), sums of x_t and its square over all cells, for the statistics of BatchNorm.
    """

    def __init__(self, dim: int, weightings: Tensor) -> None:
        ways, num_classes = weightings.shape
        self.weightings = weightings
        self.gram = torch.zeros(ways, dim + 1, dim + 1, dtype=torch.float64, device=weightings.device)
        self.cross = self.gram.new_zeros(dim + 1, num_classes)
        self.cells = self.gram.new_zeros(2, dim + 1)

    def add(self, features: Tensor, labels: CellLabels) -> None:
        """Add maps (B, D, h, w) with labels on the same grid."""
        x = F.pad(features.double().permute(0, 2, 3, 1).flatten(0, 2), (0, 1), value=1)  # (cells, D + 1)
        for gram, coupling in zip(self.gram, labels.coupling, strict=True):
            coupled = torch.zeros_like(x)
            for weight, step in zip(coupling[..., None], labels.steps, strict=True):
                coupled[: len(x) - step].addcmul_(weight[: len(x) - step], x[step:])
            half = x.T @ coupled  # each pair once, each cell with itself at half weight
            gram += half + half.T
        self.cross += x.T @ labels.shares
        self.cells += torch.stack((x.sum(dim=0), (x**2).sum(dim=0)))

    def tensors(self) -> dict[str, Tensor]:
        """Return all sums by name, without copying them."""
        return {"gram": self.gram, "cross": self.cross, "cells": self.cells}

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance (D,) of the features over all cells."""
        (mean, square), count = self.cells[:, :-1] / self.cells[0, -1], self.cells[0, -1]
        return mean, ((square - mean**2) * count / (count - 1).clamp(min=1)).clamp(min=0)


class LinearMap(NamedTuple):
    """Affine map from features to class scores: weight x + bias."""

    weight: Tensor  # (K, D) float64
    bias: Tensor  # (K,) float64


def solve(sums: Sums, strengths: Sequence[float]) -> Iterator[list[LinearMap]]:
    """Yield for each weighting the ridge solutions of all strengths.

    Each minimises, over pixels p with weights w_p and one-hot labels y_p,
    sum_p w_p |y_p - (W x_p + b)|^2 / sum_p w_p + strength * sum_j s_j^2 |W_j|^2
    with s_j the standard deviation of feature j over these pixels. This is the usual ridge on standardised features,
    with an unpenalised bias. A feature without any spread, and a class without pixels, get zeros.

    Raises:
        UserError: there is no labelled pixel, or a feature is not finite.
    """
    for gram, weights in zip(sums.gram, sums.weightings, strict=True):
        total, cross = gram[-1, -1], sums.cross * weights
        if not torch.isfinite(gram).all():
            raise UserError("Features are not finite: check backbone.weights, or set engine.precision=fp32.")
        if total <= 0:
            raise UserError("No pixel of the training masks is labelled, so there is nothing to solve. Check them.")
        mean, share = gram[:-1, -1] / total, cross[-1] / total
        covariance = gram[:-1, :-1] / total - torch.outer(mean, mean)
        variance = covariance.diagonal()
        # below this, the variance is rounding error of a constant feature
        spread = variance > 1e-12 * (variance + mean**2)
        scale = torch.where(spread, variance, 1).rsqrt() * spread
        values, vectors = torch.linalg.eigh(covariance * scale[:, None] * scale)
        target = vectors.T @ (scale[:, None] * (cross[:-1] / total - torch.outer(mean, share)))  # (D, K)
        solutions = []
        for strength in strengths:
            weight = (scale[:, None] * (vectors @ (target / (values.clamp(min=0) + strength)[:, None]))).T
            solutions.append(LinearMap(weight, share - weight @ mean))
        yield solutions


def reads(length: int, cells: int, share: float) -> Tensor:
    """Return how much each pixel of an axis reads of each cell (length, cells), float64."""
    (span,) = spans(length, cells, share, length, torch.empty(0, dtype=torch.float64))
    weights = torch.eye(length, dtype=torch.float64) if span.weights is None else span.weights
    return F.pad(weights, (span.cells.start, cells - span.cells.stop))


def _next(reads: Tensor) -> Tensor:
    """Return how much each pixel reads of the next cell; 0 for the last one."""
    return F.pad(reads[:, 1:], (0, 1))
