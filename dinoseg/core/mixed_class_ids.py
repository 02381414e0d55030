"""Class IDs of a mixture of masks; masks that contribute little to a tile are skipped at most of its pixels."""

import functools

import torch
from torch import Tensor

from dinoseg.core.geometry import Span, spans, upsample_tile
from dinoseg.utils.threads import threads

_ROWS = 32  # of a tile
_CACHED = 2**18  # numbers of a tile
_LAUNCHED = 2**25  # on an accelerator, where kernel launches take time
_LEFT_OUT = 2**-5  # maximum of a class's score that the masks skipped in a tile may add up to
_SINGLE = 12  # cost of a mask at a single pixel, relative to a pixel of a whole tile


@torch.no_grad()
def mixed_class_ids(masks: Tensor, shares: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return the IDs (B, H, W) uint8 of the classes that a mixture of masks scores highest.

    A class's score is the sum over masks of share times sigmoid of the upsampled logits. Ties go to the first class;
    scores that differ only by rounding may go to either.

    Upsampled logits lie between those of the cells around them, which bounds a mask's contribution to a tile. Masks
    whose contributions together stay below a limit are evaluated only at some pixels: where they could change which
    class is best. This holds on a CPU; on an accelerator, it would require a device sync.

    Args:
        masks: logits (B, Q, h, w) of at least float32.
        shares: (B, Q, K), at least 0, of each mask in each class.
        size: (H, W) of the IDs.
        valid: share of the grid's height and width that lies on the image.
    """
    (height, width), numbers = size, masks.shape[1] + shares.shape[2]
    on_cpu = masks.device.type == "cpu"
    high = _ROWS if on_cpu else max(1, _LAUNCHED // (numbers * width))
    wide = max(1, _CACHED // (_ROWS * numbers)) if on_cpu else width
    rows = spans(height, masks.shape[2], valid[0], high, masks)
    columns = spans(width, masks.shape[3], valid[1], wide, masks)
    with torch.autocast(masks.device.type, enabled=False), threads(masks.device) as each:
        images = [
            torch.cat(list(each(functools.partial(_band_ids, *image, columns), rows)))
            for image in zip(masks, shares, strict=True)
        ]
    return torch.stack(images)


@torch.no_grad()  # grad mode is per thread
def _band_ids(masks: Tensor, shares: Tensor, columns: list[Span], rows: Span) -> Tensor:
    """Return the IDs (r, W) of a band of rows of one image."""
    return torch.cat([_tile_ids(masks[:, rows.cells, tile.cells], shares, rows, tile) for tile in columns], dim=1)


def _tile_ids(cells: Tensor, shares: Tensor, rows: Span, columns: Span) -> Tensor:
    """Return the IDs (r, c) of a tile from the masks' cells (Q, h, w)."""
    if cells.device.type != "cpu":
        scores = _scores(upsample_tile(cells, rows, columns), shares)
        return scores.max(0).indices.to(torch.uint8)
    most = cells.flatten(1).amax(1).sigmoid()[:, None] * shares  # (Q, K) maximum contribution of each mask
    least_first = most.amax(1).argsort()
    few = int((most[least_first].cumsum(0).amax(1) < _LEFT_OUT).sum())
    out, remaining = least_first[:few], least_first[few:]
    scores = _scores(upsample_tile(cells[remaining], rows, columns), shares[remaining])  # (K, r, c)
    best = scores.max(0)
    if few:
        rivals = scores + most[out].sum(0)[:, None, None]
        rivals.scatter_(0, best.indices[None], -torch.inf)
        y, x = (rivals.amax(0) >= best.values).nonzero(as_tuple=True)
        if len(y) * _SINGLE > best.values.numel():
            scores += _scores(upsample_tile(cells[out], rows, columns), shares[out])
            best = scores.max(0)
        elif len(y):
            along = cells[out][..., x] if columns.weights is None else cells[out] @ columns.weights[x].T  # (q, h, n)
            down = torch.eye(cells.shape[1], dtype=cells.dtype) if rows.weights is None else rows.weights
            pixels = torch.einsum("qhn,nh->qn", along, down[y])
            best.indices[y, x] = (scores[:, y, x] + _scores(pixels, shares[out])).max(0).indices
    return best.indices.to(torch.uint8)


def _scores(pixels: Tensor, shares: Tensor) -> Tensor:
    """Return scores (K, ...) from upsampled logits (Q, ...), which are overwritten, and shares (Q, K)."""
    return (shares.T @ pixels.sigmoid_().flatten(1)).unflatten(1, pixels.shape[1:])
