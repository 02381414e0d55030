"""Conversion of pixel masks to feature-grid cells: one-hot labels, area-weighted means and the IoU of masks."""

import torch
from torch import Tensor

from dinoseg.utils.devices import to_device
from dinoseg.utils.errors import UserError


def one_hot(ids: Tensor, num_labels: int | None = None) -> Tensor:
    """Return IDs (H, W) as one-hot labels (L, H, W), float32; L is `num_labels`, or the highest ID + 1.

    Raises:
        UserError: an ID is outside 0..255 or 0..L-1.
    """
    num_labels = label_count(ids, num_labels)
    return torch.stack([ids == label for label in range(num_labels)]).float()


def label_count(ids: Tensor, num_labels: int | None = None) -> int:
    """Return the number of labels for these IDs: `num_labels`, or the highest ID + 1.

    Raises:
        UserError: an ID is outside 0..255 or 0..num_labels-1.
    """
    low, high = int(ids.min()), int(ids.max())
    num_labels = high + 1 if num_labels is None else num_labels
    if low < 0 or high >= min(num_labels, 256):
        raise UserError(
            f"The mask holds the id {low if low < 0 else high}: ids must be 0 to {min(num_labels - 1, 255)}; 0 is the "
            "background. Renumber the objects."
        )
    return num_labels


def area_mean(pixels: Tensor, grid: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return the mean (K, h, w) of pixels (K, H, W) in each cell; pixels that span cells are weighted by area.

    Only the top-left `valid` fraction of the grid lies on the pixels. Cells partly beyond average the part on the
    pixels; cells wholly beyond are 0.
    """
    # the area of an overlap is height times width: two small products instead of a weight per pixel and cell
    rows = _overlaps(pixels.shape[-2], grid[0], valid[0]).to(pixels.dtype)  # (h, H)
    columns = _overlaps(pixels.shape[-1], grid[1], valid[1]).to(pixels.dtype)  # (w, W)
    # half precision rounds means to 3 digits, too few for the small differences between frames
    with torch.autocast(pixels.device.type, enabled=False):
        return to_device(rows, pixels.device) @ pixels @ to_device(columns, pixels.device).T


def soft_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the IoU (A, B) of soft masks (A, h, w) and (B, h, w) in 0..1: sum of minima over sum of maxima.

    For binary masks this is the usual IoU; that of two empty masks is 0.
    """
    iou = first.new_zeros(len(first), len(second))
    for row, mask in zip(iou, first, strict=True):  # one at a time: all pairs at once would take A x B grids
        least = torch.minimum(mask, second).sum((1, 2))
        row.copy_(least / (mask.sum() + second.sum((1, 2)) - least).clamp(min=1e-12))
    return iou


def _overlaps(length: int, cells: int, valid: float) -> Tensor:
    """Return the weights (cells, length) of the mean over each cell's pixels."""
    edges = (torch.arange(cells + 1, dtype=torch.float64) * length / (cells * valid)).clamp(max=length)
    pixels = torch.arange(length, dtype=torch.float64)
    ends, starts = edges[1:, None].minimum(pixels + 1), edges[:-1, None].maximum(pixels)
    overlap = (ends - starts).clamp(min=0)
    return overlap / overlap.sum(1, keepdim=True).clamp(min=1e-12)
