"""Sums over mask pixels of scores that are upsampled tile by tile, without full-size tensors.

Upsampling is two small matrix products, its gradient their transposes. Without full-size logits, softmax and
gradients, the data of a tile fit into the processor's cache.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinoseg.core.geometry import Span, reduce_tile, spans, upsample_tile
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.core.targets import UNLABELLED, label_ids
from dinoseg.losses.fused import Fused, FusedOrTiled, KernelSpec, PixelSums
from dinoseg.utils.devices import threads
from dinoseg.utils.precision import at_least_float32

ROWS = 32  # rows of a tile
CACHED = 2**18  # values per tile on a CPU: 1 MiB of float32
LAUNCHED = 2**25  # values per tile on an accelerator, to amortise kernel launches: 128 MiB

Vjp = Callable[[Tensor], Tensor]
TileLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Vjp]]
"""Sums of a tile: maps scores (K, N), which it may overwrite, labels (N,) and pixel weights (N,), 0 for unlabelled
pixels, to sums (S,) and a function from their gradient (S,) to that of the scores (K, N), called at most once."""
Cost = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Vjp]]
"""Cost of each pixel: maps the same to costs (N,), weights (N,) in a mean, and a function from the gradient of both
sums (2,) to that of the scores."""
Value = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Value of each pixel (N,), from the same arguments."""
ExtraValues = Callable[[int, slice, slice], Tensor]
"""Maps an image index, rows and columns to values (M, r, c) of these pixels, which need no gradient."""


def pixel_sums(
    prediction: Prediction,
    batch: Batch,
    ignore_index: int,
    term: TileLoss,
    *,
    weights: Tensor | None = None,
    first_alone: bool = False,
    form: KernelSpec | None = None,
    extra: ExtraValues | None = None,
) -> Tensor:
    """Return the sums (S,) of a term over all mask pixels, computed from logits in float32 or better.

    The sums can be differentiated once. If only the first depends on the scores, the forward pass also computes its
    gradient; otherwise the backward pass upsamples the scores again.

    Args:
        prediction: with `grid` or `masks`, no full-size scores are needed.
        batch: its masks (B, H, W) determine the size to which scores are upsampled.
        ignore_index: mask value mapped to UNLABELLED for the term.
        term: function of the pixels of a tile.
        weights: pixel weights (B, H, W); None: 1 each. Unlabelled pixels always get 0.
        first_alone: whether all sums except the first depend on the labels only.
        form: the term in the form of the CUDA kernel, if it has one; the kernel supports no weights.
        extra: additional values, passed to the term as rows after the scores; they get no gradient.
    """
    parts, valid = _parts(prediction, batch)
    tiles = _Tiles.over(parts, batch.mask, valid, ignore_index, weights)
    implementation: PixelSums = _Tiled(replace(tiles, extra=extra), term)
    if form is not None and prediction.grid is not None and weights is None:
        fused = Fused(batch.mask, valid, ignore_index, form)
        implementation = FusedOrTiled(fused, implementation) if fused.takes(parts[0]) else implementation
    return _Sums.apply(implementation, first_alone, *parts)


@torch.no_grad()
def pixel_values(prediction: Prediction, batch: Batch, ignore_index: int, value: Value) -> Tensor:
    """Return a function's value for each mask pixel, (B, H, W), computed from the same logits as in `pixel_sums`."""
    parts, valid = _parts(prediction, batch)
    tiles = _Tiles.over(parts, batch.mask, valid, ignore_index)
    device = parts[0].device

    # grad mode is per thread
    @torch.no_grad()
    def of_band(band: tuple[int, Span]) -> Tensor:
        row = (tiles.tile(parts, band, columns) for columns in tiles.columns)
        found = [value(tile.scores, tile.target, tile.counted).view(tile.pixels.shape[1:]) for tile in row]
        return torch.cat(found, dim=1)  # (rows, W)

    with torch.autocast(device.type, enabled=False), threads(device) as each:
        return torch.cat(list(each(of_band, tiles.bands))).view(batch.mask.shape)


def _parts(prediction: Prediction, batch: Batch) -> tuple[list[Tensor], tuple[float, float]]:
    """Return the tensors that scores are computed from, and the share of their grid that the images cover."""
    if prediction.grid is not None:
        return [at_least_float32(prediction.grid)], prediction.valid
    if prediction.masks is not None:
        return [at_least_float32(part) for part in prediction.masks], prediction.valid
    # scores of another form come at mask size: a grid whose cells are the pixels, which tiles only cut
    scores = prediction.logits((batch.mask.shape[-2], batch.mask.shape[-1]))
    return [at_least_float32(scores)], (1.0, 1.0)


class _Tile(NamedTuple):
    """Pixels of a tile: upsampled values, scores, labels, weights, and the gradient function."""

    pixels: Tensor  # (K, rows, columns), or (Q, rows, columns) of masks
    scores: Tensor  # (K, N), or (K + M, N) with M additional values
    target: Tensor  # (N,)
    counted: Tensor  # (N,)
    back: Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class _Tiles:
    """Mask pixels (B, H, W) in bands of rows, each split into tiles of columns.

    Their scores are computed from `parts`. The first is a grid (B, K, h, w) of scores; or a grid of Q masks, followed
    by the class shares (B, Q, K) of the masks.
    """

    mask: Tensor
    weights: Tensor | None  # (B, H, W)
    ignore_index: int
    bands: list[tuple[int, Span]]  # image, rows
    columns: list[Span]
    fixed: bool  # masks without gradient: only their class shares get one
    extra: ExtraValues | None = None

    @classmethod
    def over(
        cls,
        parts: Sequence[Tensor],
        mask: Tensor,
        valid: tuple[float, float],
        ignore_index: int,
        weights: Tensor | None = None,
    ) -> "_Tiles":
        """Return the tiles of masks for some parts."""
        (images, height, width), grid = mask.shape, parts[0]
        numbers = grid.shape[1] + sum(part.shape[2] for part in parts[1:])  # values per pixel
        if mask.device.type == "cpu":
            # a tile's scores, softmax and gradient stay in the processor's cache: cross-entropy of 26 classes takes
            # 0.22 of the time of full-size logits (benchmarks/full_resolution_loss.py)
            rows, across = ROWS, max(1, CACHED // (ROWS * numbers))
        else:
            # whole rows: on an accelerator, launching a kernel for every small tile would take longer than its work
            rows, across = max(1, LAUNCHED // (numbers * width)), width
        # bilinear weights of an axis are the same for all tiles of a row or column, so they are made once
        bands = spans(height, grid.shape[2], valid[0], rows, grid)
        columns = spans(width, grid.shape[3], valid[1], across, grid)
        of_images = [(image, band) for image in range(images) for band in bands]
        # of a frozen mask head, whose masks need no gradient: without it this takes 0.15 instead of 0.21 s
        # (docs/log/caching_and_reading.md)
        return cls(mask, weights, ignore_index, of_images, columns, len(parts) > 1 and not grid.requires_grad)

    def tile(self, parts: Sequence[Tensor], band: tuple[int, Span], columns: Span) -> _Tile:
        """Return the tile of some columns of a band."""
        image, rows = band
        # only the cells around the tile are upsampled, so that no tensor has K channels at the size of the mask
        cells = parts[0][image, :, rows.cells]
        pixels = upsample_tile(cells[..., columns.cells], rows, columns)
        scores = pixels.flatten(1)
        back: Callable[[Tensor], tuple[Tensor, ...]] = _pass_through
        if len(parts) > 1:
            scores, back = _mix_masks(scores, *(part[image] for part in parts[1:]), fixed=self.fixed)
        if self.extra is not None:
            scores = torch.cat([scores, self.extra(image, rows.pixels, columns.pixels).to(scores).flatten(1)])
        index = image, rows.pixels, columns.pixels
        target = label_ids(self.mask[index], self.ignore_index).flatten()
        # one weight per pixel serves every loss: 0 for unlabelled pixels, and for pixels that a selection leaves out
        counted = (target != UNLABELLED).to(scores.dtype)
        if self.weights is not None:
            counted *= self.weights[index].flatten()
        return _Tile(pixels, scores, target, counted, back)


@dataclass(frozen=True)
class _Tiled:
    """A term summed over the pixels of tiles."""

    tiles: _Tiles
    term: TileLoss

    @torch.no_grad()
    def sums(self, parts: Sequence[Tensor], upstream: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Return the sums (S,) and, given their gradient (S,), the gradients of the parts.

        Bands are added in a fixed order, whichever thread computes them, so that results are deterministic.
        """
        gradients = [] if upstream is None else [torch.zeros_like(part) for part in parts]
        found = []
        run_band = functools.partial(self._band, parts, upstream)
        with torch.autocast(parts[0].device.type, enabled=False), threads(parts[0].device) as each:
            # threads take bands, and their results are added here in the order of the bands: equal bits for any number
            # of threads
            for (image, rows), (sums, added) in zip(self.tiles.bands, each(run_band, self.tiles.bands), strict=True):
                found.append(sums)
                for number, more in enumerate(added):
                    # a band reads a few rows of the grid, which it shares with its neighbours, and all of the class
                    # shares
                    gradient = gradients[number][image]
                    gradient = gradient if number else gradient[:, rows.cells]
                    gradient += more
        return torch.stack(found).sum(0), gradients

    # grad mode is per thread
    @torch.no_grad()
    def _band(
        self, parts: Sequence[Tensor], upstream: Tensor | None, band: tuple[int, Span]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the sums of a band of one image's rows, and the gradients of the parts that it uses."""
        image, rows = band
        read = parts[0][image, :, rows.cells], *(part[image] for part in parts[1:])
        gradients = [] if upstream is None else [torch.zeros_like(part) for part in read]
        found = []
        for columns in self.tiles.columns:
            tile = self.tiles.tile(parts, band, columns)
            sums, pull = self.term(tile.scores, tile.target, tile.counted)
            found.append(sums)
            if upstream is not None:
                # backpropagated within the tile: its scores are in the cache still, and no gradient of full size is
                # stored
                pulled, *of_shares = tile.back(pull(upstream))
                if not self.tiles.fixed:
                    pulled = reduce_tile(pulled.view_as(tile.pixels), rows, columns)
                    gradients[0][..., columns.cells] += pulled
                for gradient, more in zip(gradients[1:], of_shares, strict=True):
                    gradient += more
        return torch.stack(found).sum(0), gradients


class _Sums(torch.autograd.Function):
    """Autograd function of the sums over pixels, for any implementation of `PixelSums`."""

    @staticmethod
    def forward(ctx: Any, implementation: PixelSums, first_alone: bool, *parts: Tensor) -> Tensor:
        ctx.first_alone, ctx.implementation = first_alone, implementation
        # if only the first sum depends on the scores, the gradient of any loss is upstream[0] times that of this sum:
        # the pass over the tiles that adds it up returns both, and the backward pass upsamples nothing
        one = parts[0].new_ones(1) if first_alone and any(ctx.needs_input_grad) else None
        sums, gradients = implementation.sums(parts, one)
        ctx.save_for_backward(*(gradients or parts))
        return sums

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # `create_graph`: a second derivative would silently treat the result as a constant
        if torch.is_grad_enabled():
            raise NotImplementedError("A sum over tiles cannot be differentiated twice: leave out create_graph.")
        saved = ctx.saved_tensors
        if ctx.first_alone:
            return None, None, *(gradient * upstream[0] for gradient in saved)
        # else, as for dice, the gradient depends on all sums (of the whole batch): a second pass over the tiles
        return None, None, *ctx.implementation.sums(saved, upstream)[1]


def _pass_through(pulled: Tensor) -> tuple[Tensor, ...]:
    return (pulled,)


def _mix_masks(masks: Tensor, shares: Tensor, *, fixed: bool) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """Return the logits (K, N) of masks (Q, N), which are overwritten, and the gradient function.

    That function returns the gradients of masks and shares; for `fixed` masks the first one is not meaningful.
    """
    # p_k = sum_q a_qk sigmoid(m_q), MaskFormer's semantic inference (arXiv 2107.06278, section 3.4)
    masks.sigmoid_()
    scores = shares.T @ masks
    least = torch.finfo(torch.float32).tiny  # as in `Prediction.as_logits`
    clamped = scores.clamp(min=least)

    def back(pulled: Tensor) -> tuple[Tensor, ...]:
        # d log p_k / d p_k = 1 / p_k; a clamped p_k is constant
        slope = (pulled / clamped).masked_fill_(scores < least, 0)
        # d p_k / d m_q = a_qk s (1 - s) with s = sigmoid(m_q); d p_k / d a_qk = s
        of_masks = slope if fixed else (shares @ slope).mul_(masks).mul_(1 - masks)
        return of_masks, masks @ slope.T

    return clamped.log(), back
