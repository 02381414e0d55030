"""Images and score maps in bands of rows, at any scale: neither has to be resized as a whole."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.geometry import to_unit_range

Size = tuple[int, int]  # (H, W)
_READ = 256  # rows of a file that are resized at once
_PIECE = 2**24  # elements of an enlarged band that are yielded at once; bounds memory for any scale factor


class Rows(Protocol):
    """Images of one size with random access to their rows."""

    size: Size
    count: int  # B

    def read(self, top: int, bottom: int) -> Tensor:
        """Return the rows (B, C, bottom - top, W), uint8 or floats in 0..1, on the model's device."""
        ...


class MemoryRows(Rows):
    """Rows of images (B, C, H, W) in memory; 16-bit levels become floats, which torch can flip and resize anywhere.

    Args:
        images: on the model's device.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images if images.dtype == torch.uint8 else to_unit_range(images)
        self.count, self.size = len(images), (images.shape[-2], images.shape[-1])

    def read(self, top: int, bottom: int) -> Tensor:
        """Return the rows (B, C, bottom - top, W)."""
        return self.images[:, :, top:bottom]


class ResizedRows(Rows):
    """Rows of resized images, equal to `F.interpolate(..., mode="bilinear", antialias=antialias)`."""

    def __init__(self, rows: Rows, size: Size, *, antialias: bool = True) -> None:
        self.rows, self.size, self.count = rows, size, rows.count
        self.antialias = antialias

    def read(self, top: int, bottom: int) -> Tensor:
        """Return the rows (B, C, bottom - top, W) as floats in 0..1."""
        height, width = self.rows.size[0], self.size[1]
        scale = height / self.size[0]
        # a triangle filter, as wide as `scale` input rows on each side where the image is reduced
        reach = max(1.0, scale) if self.antialias else 1.0
        centres = (torch.arange(top, bottom, dtype=torch.float64) + 0.5) * scale
        first = max(0, int(centres[0] - reach))
        last = min(height, int(centres[-1] + reach) + 1)
        distance = (torch.arange(first, last, dtype=torch.float64) + 0.5 - centres[:, None]).abs() / reach
        weights = (1 - distance).clamp(min=0)  # (rows out, rows in)
        # at the border of the image, part of the filter has no rows: the others share its weight
        weights /= weights.sum(dim=1, keepdim=True)
        total: Tensor | None = None
        # only some rows of the file are in memory at a time, with their columns resized
        for start in range(first, last, _READ):
            end = min(start + _READ, last)
            part = self.rows.read(start, end)
            part = to_unit_range(part)
            part = F.interpolate(part, (end - start, width), mode="bilinear", antialias=self.antialias)
            added = weights[:, start - first : end - first].to(part) @ part
            total = added if total is None else total.add_(added)
        assert total is not None
        return total


def at_size(bands: Iterable[Tensor], grid: Size, size: Size) -> Iterator[Tensor]:
    """Resize bands (B, K, r, w) of a map of size `grid` (h, w) bilinearly to `size` (H, W), as `F.interpolate` does."""
    if grid == size:
        yield from bands
        return
    # pixel centres aligned (`align_corners=False`): output row y reads grid row (y + 1/2) h / H - 1/2
    positions = ((torch.arange(size[0], dtype=torch.float64) + 0.5) * grid[0] / size[0] - 0.5).clamp(0, grid[0] - 1)
    above = positions.long()  # (H,) grid row at or above each output row
    below = (above + 1).clamp(max=grid[0] - 1)
    pending = None  # grid rows that are still needed
    top = 0  # index of the first of them
    done = 0  # output rows yielded
    for band in bands:
        pending = band if pending is None else torch.cat([pending, band], dim=2)
        # a band ends anywhere, so rows between it and the next one wait for that
        known = top + pending.shape[2]
        ready = int((below < known).sum())  # `below` is sorted
        step = max(1, _PIECE // (pending.shape[0] * pending.shape[1] * size[1]))
        for start in range(done, ready, step):
            end = min(start + step, ready)
            share = (positions[start:end] - above[start:end]).to(pending)[:, None]
            upper, lower = ((rows[start:end] - top).to(pending.device) for rows in (above, below))
            # rows by hand, columns by torch: F.interpolate would take the borders of a band for those of the image
            piece = torch.lerp(pending.index_select(2, upper), pending.index_select(2, lower), share)
            yield F.interpolate(piece, (end - start, size[1]), mode="bilinear")
        # `above` is sorted, so earlier grid rows are never read again
        first_needed = min(int(above[ready]), known) if ready < size[0] else known
        pending = pending[:, :, first_needed - top :].clone()
        top = first_needed
        done = ready


def mean(streams: list[Iterator[Tensor]]) -> Iterator[Tensor]:
    """Yield the mean of streams of bands (B, K, r, W), whose band boundaries may differ."""
    if len(streams) == 1:
        yield from streams[0]
        return
    for bands in align(streams):
        yield torch.stack(bands).mean(dim=0)


def align(streams: Sequence[Iterator[Tensor]]) -> Iterator[list[Tensor]]:
    """Yield the same rows of each of several streams of bands (B, K, r, W), whose band boundaries may differ."""
    pending: list[Tensor | None] = [None] * len(streams)
    while True:
        for number, stream in enumerate(streams):
            band = pending[number]
            if band is None or not band.shape[2]:
                pending[number] = next(stream, None)
        bands = [band for band in pending if band is not None]
        if not bands:
            return
        # streams of other scales end their bands at other rows: what all of them have is passed on
        rows = min(band.shape[2] for band in bands)
        yield [band[:, :, :rows] for band in bands]
        pending = [band[:, :, rows:] for band in bands]
