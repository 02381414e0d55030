"""Sums of `full_resolution.py` by a CUDA kernel where device and sizes suit it; by tiles where it does not run."""

import functools
import importlib.util
import logging
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dinoseg.core.geometry import cell_weights
from dinoseg.utils.devices import to_device

ENLARGED = 16  # minimum pixels per grid cell: the kernel stores gradients for the four corners of each cell
_TILE, _PIXELS = 2048, 64  # scores in registers and pixels, per iteration
_MAX = 1024  # maximum number of classes

log = logging.getLogger(__name__)
_failed: set[torch.device] = set()  # devices on which the kernel does not run


class KernelSpec(NamedTuple):
    """Sums of a softmax: weighted cross-entropy as (cost, weight), or without weights the overlap as (3 K,) sums."""

    weights: Tensor | None = None  # (K,)
    smoothing: float = 0.0


class PixelSums(Protocol):
    """Implementation of a sum over pixels."""

    def sums(self, parts: list[Tensor] | tuple[Tensor, ...], upstream: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Return the sums (S,) and, given their gradient (S,), the gradients of the parts."""
        ...


@dataclass(frozen=True)
class Fused:
    """A form summed over the pixels of masks (B, H, W) in one kernel launch; bitwise deterministic."""

    mask: Tensor
    valid: tuple[float, float]
    ignore_index: int
    form: KernelSpec

    def takes(self, grid: Tensor) -> bool:
        """Return whether to use the kernel for a grid (B, K, h, w): on CUDA, and much smaller than the masks.

        The kernel was faster than tiles in 46 of 48 such trainings (docs/log/cuda.md).
        """
        if grid.device.type != "cuda" or not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
            return False
        enlarged = self.mask.numel() * grid.shape[1] >= ENLARGED * grid.numel()
        return enlarged and grid.dtype == torch.float32 and grid.shape[1] <= _MAX

    @torch.no_grad()
    def sums(self, parts: list[Tensor] | tuple[Tensor, ...], upstream: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Return the sums (S,) and, given their gradient (S,), that of the only part (B, K, h, w).

        For cross-entropy only the gradient of the cost is used.
        """
        from dinoseg.losses.fused_kernel import add_up

        (grid,), (images, height, width) = parts, self.mask.shape
        classes, rows, columns = grid.shape[1:]
        cells, padded = images * (rows + 1) * (columns + 1), 1 << (classes - 1).bit_length()
        found, slopes = grid.new_empty(cells, 3, classes), grid.new_empty(0)
        if upstream is not None:
            slopes = grid.new_empty(cells, 4, classes)
        add_up[(cells,)](
            grid.permute(0, 2, 3, 1).contiguous(),
            self.mask.contiguous(),
            *_tables((height, width), (rows, columns), self.valid, grid.device),
            self._of_classes(grid, upstream),
            found,
            slopes,
            (classes, rows, columns, height, width, self.ignore_index),
            self.form.smoothing,
            CLASSES=padded,
            PIXELS=min(_PIXELS, max(1, _TILE // padded)),
            ENTROPY=self.form.weights is not None,
            GRADIENT=upstream is not None,
            enable_fp_fusion=True,
        )
        sums = found.sum(0)
        sums = sums.flatten() if self.form.weights is None else sums[:2].sum(1)
        if upstream is None:
            return sums, []
        gradient = _of_cells(slopes.view(images, rows + 1, columns + 1, 2, 2, classes))
        return sums, [gradient if self.form.weights is None else gradient * upstream[0]]

    def _of_classes(self, grid: Tensor, upstream: Tensor | None) -> Tensor:
        """Return the two values per class (2, K) that the kernel reads.

        Raises:
            RuntimeError: the number of weights differs from the number of classes, so the kernel would read out of
                bounds.
        """
        if self.form.weights is not None:
            return self.form.weights.to(grid).expand(2, grid.shape[1]).contiguous()
        return grid.new_zeros(2, grid.shape[1]) if upstream is None else upstream.view(3, -1)[:2].contiguous()


@dataclass(frozen=True)
class FusedOrTiled:
    """The kernel, or the tiles on a device on which the kernel has failed."""

    kernel: PixelSums
    tiles: PixelSums

    def sums(self, parts: list[Tensor] | tuple[Tensor, ...], upstream: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Return the sums (S,) and, given their gradient (S,), the gradients of the parts."""
        device = parts[0].device
        if device not in _failed:
            try:
                return self.kernel.sums(parts, upstream)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton compiles at the first call: it needs a C compiler and a fitting driver
                _failed.add(device)
                reason = str(error).strip().splitlines() or [type(error).__name__]
                log.warning("losses: the Triton kernel does not run here (%s); using torch instead.", reason[-1])
        return self.tiles.sums(parts, upstream)


@functools.lru_cache(maxsize=16)
def _tables(
    size: tuple[int, int], grid: tuple[int, int], valid: tuple[float, float], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return, for the kernel, the first pixel between each pair of grid neighbours, and interpolation weights."""
    starts, reads = [], []
    for length, cells, share in zip(size, grid, valid, strict=True):
        low, weights = cell_weights(length, cells, share, torch.float32)
        starts.append(torch.searchsorted(low, torch.arange(-1, cells + 1)))
        reads.append(weights.flatten())
    return to_device(torch.cat(starts).int(), device), to_device(torch.cat(reads), device)


def _of_cells(corners: Tensor) -> Tensor:
    """Return gradients (B, K, h, w), summed over the corners (B, h + 1, w + 1, 2, 2, K) of cells.

    Corners outside the grid are added to its edge.
    """
    images, rows, columns, _, _, classes = corners.shape
    summed = corners.new_zeros(images, rows + 1, columns + 1, classes)
    for down, along in ((0, 0), (0, 1), (1, 0), (1, 1)):
        summed[:, down : down + rows, along : along + columns] += corners[:, :, :, down, along]
    for axis in (1, 2):
        summed.select(axis, 1).add_(summed.select(axis, 0))
        summed.select(axis, -2).add_(summed.select(axis, -1))
    return summed[:, 1:-1, 1:-1].permute(0, 3, 1, 2).contiguous()
