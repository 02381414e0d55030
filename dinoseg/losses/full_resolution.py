"""Sums over the masks' pixels of scores that are upsampled a tile at a time: none is ever held at full size.

Upsampling is two small matrix products, its gradient their transposes. Without the full-size logits, their softmax and
their gradient, what a tile needs stays in a processor's cache.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoseg.geometry import Span, spans
from dinoseg.losses.labelled import labels
from dinoseg.precision import at_least_float32
from dinoseg.processes.threads import threads
from dinoseg.shapes import Batch, Prediction

ROWS = 32  # of a tile
CACHED = 2**18  # numbers of a tile on a CPU: 1 MiB of float32
LAUNCHED = 2**25  # on an accelerator, where each operation has to be worth its launch: 128 MiB

Pull = Callable[[Tensor], Tensor]
Term = Callable[[Tensor, Tensor], tuple[Tensor, Pull]]
"""What a loss adds up: from scores (K, N), which it may overwrite, and labels (N,), to sums (S,) and how their gradient
(S,) becomes that of the scores (K, N), which is asked once at most."""


def pixel_sums(
    prediction: Prediction, batch: Batch, ignore_index: int, term: Term, *, first_alone: bool = False
) -> Tensor:
    """Return the sums (S,) of a term over all pixels of the masks, of logits of at least float32.

    They can be differentiated once. Where the first alone depends on the scores, its gradient is found in the same
    pass; else the scores are upsampled once more in the backward pass.

    Args:
        prediction: one that says its `grid` needs no scores at full size.
        batch: whose masks (B, H, W) give the size, at which the scores are taken.
        ignore_index: mask value that is UNLABELLED to the term.
        term: of the pixels of a tile.
        first_alone: whether all sums but the first depend on the labels alone.
    """
    height, width = batch.mask.shape[-2:]
    grid, valid = prediction.grid, prediction.valid
    if grid is None:
        grid, valid = prediction.logits((height, width)), (1.0, 1.0)
    grid = at_least_float32(grid)
    return _Sums.apply(grid, _Tiled.over(grid, batch.mask, valid, ignore_index, term), first_alone)


@dataclass(frozen=True)
class _Tiled:
    """A term over the pixels of masks (B, H, W), in bands of rows, each in tiles of columns."""

    mask: Tensor
    ignore_index: int
    term: Term
    bands: list[tuple[int, Span]]  # image, rows
    columns: list[Span]

    @classmethod
    def over(cls, grid: Tensor, mask: Tensor, valid: tuple[float, float], ignore_index: int, term: Term) -> "_Tiled":
        """Lay tiles over masks for a grid (B, K, h, w)."""
        images, height, width = mask.shape
        num_classes, grid_h, grid_w = grid.shape[1:]
        if mask.device.type == "cpu":
            rows, across = ROWS, max(1, CACHED // (ROWS * num_classes))
        else:
            rows, across = max(1, LAUNCHED // (num_classes * width)), width
        bands = spans(height, grid_h, valid[0], rows, grid)
        columns = spans(width, grid_w, valid[1], across, grid)
        return cls(mask, ignore_index, term, [(image, band) for image in range(images) for band in bands], columns)

    @torch.no_grad()
    def sums(self, grid: Tensor, upstream: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the sums (S,) and, given the gradient of these (S,), that of the grid.

        Bands are added up in their order, whichever thread they come from.
        """
        gradient = None if upstream is None else torch.zeros_like(grid)
        found = []
        with torch.autocast(grid.device.type, enabled=False), threads(grid.device) as each:
            for (image, rows), (sums, part) in zip(
                self.bands, each(functools.partial(self._band, grid, upstream), self.bands), strict=True
            ):
                found.append(sums)
                if gradient is not None:
                    gradient[image, :, rows.cells] += part
        return torch.stack(found).sum(0), gradient

    @torch.no_grad()  # a thread has a mode of its own
    def _band(self, grid: Tensor, upstream: Tensor | None, band: tuple[int, Span]) -> tuple[Tensor, Tensor | None]:
        """Return the sums of a band of an image's rows, and the gradient (K, h', w) of the cells that it reads."""
        image, rows = band
        cells = grid[image, :, rows.cells]
        gradient = None if upstream is None else torch.zeros_like(cells)
        found = []
        for columns in self.columns:
            scores = _upsampled(cells[..., columns.cells], rows.weights, columns.weights)  # (K, rows, columns)
            target = labels(self.mask[image, rows.pixels, columns.pixels], self.ignore_index)
            sums, pull = self.term(scores.flatten(1), target.flatten())
            found.append(sums)
            if gradient is not None and upstream is not None:
                pulled = pull(upstream).view_as(scores)
                gradient[..., columns.cells] += _reduced(pulled, rows.weights, columns.weights)
        return torch.stack(found).sum(0), gradient


class _Sums(torch.autograd.Function):
    """The sums of a `_Tiled` term, and the gradient of a grid through them."""

    @staticmethod
    def forward(ctx: Any, grid: Tensor, tiled: _Tiled, first_alone: bool) -> Tensor:
        ctx.first_alone, ctx.tiled = first_alone, tiled
        one = grid.new_ones(1) if first_alone and ctx.needs_input_grad[0] else None
        sums, gradient = tiled.sums(grid, one)
        ctx.save_for_backward(grid if gradient is None else gradient)
        return sums

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        if torch.is_grad_enabled():  # what it returns would pass for a constant
            raise NotImplementedError("A sum over tiles cannot be differentiated twice: leave out create_graph.")
        (saved,) = ctx.saved_tensors
        if ctx.first_alone:
            return saved * upstream[0], None, None
        return ctx.tiled.sums(saved, upstream)[1], None, None


def _upsampled(cells: Tensor, down: Tensor | None, along: Tensor | None) -> Tensor:
    """Return a tile (K, H, W) of its own memory from its cells (K, h, w)."""
    tile = cells.clone(memory_format=torch.contiguous_format) if along is None else cells @ along.T
    return tile if down is None else down @ tile


def _reduced(tile: Tensor, down: Tensor | None, along: Tensor | None) -> Tensor:
    """Return the gradient of the cells (K, h, w) from that of a tile (K, H, W)."""
    cells = tile if down is None else down.T @ tile
    return cells if along is None else cells @ along
