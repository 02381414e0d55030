"""Class ids of a mixture of masks: in each tile of an image, masks that add little are left out of most pixels."""

import functools

import torch
from torch import Tensor

from dinoseg.core.geometry import Span, spans, upsample_tile
from dinoseg.utils.threads import threads

_ROWS = 32  # of a tile
_CACHED = 2**18  # numbers of a tile
_LAUNCHED = 2**25  # on an accelerator, where an operation takes its time to start
_LEFT_OUT = 2**-5  # of a class's score, what the masks that are left out of a tile may add up to
_SINGLE = 12  # what a mask at a single pixel takes, against one at a pixel of a whole tile


@torch.no_grad()
def mixed_class_ids(masks: Tensor, shares: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return the ids (B, H, W) uint8 of the classes that a mixture of masks scores highest.

    A class scores the sum of each mask's share of it times the sigmoid of its upsampled logits. Of classes that score
    the same it is the first; of those that differ by no more than rounding, any. Upsampled logits lie between those of
    the cells around, so what a mask adds within a tile is bounded: of masks that together add less than a bound, only
    pixels whose best two classes are closer than these masks could bring them are asked (on a CPU: elsewhere it would
    have to be waited for).

    Args:
        masks: logits (B, Q, h, w) of at least float32.
        shares: (B, Q, K), at least 0, of each mask in each class.
        size: (H, W) of the ids.
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


@torch.no_grad()  # a thread has a mode of its own
def _band_ids(masks: Tensor, shares: Tensor, columns: list[Span], rows: Span) -> Tensor:
    """Return the ids (r, W) of a band of rows of one image."""
    return torch.cat([_tile_ids(masks[:, rows.cells, tile.cells], shares, rows, tile) for tile in columns], dim=1)


def _tile_ids(cells: Tensor, shares: Tensor, rows: Span, columns: Span) -> Tensor:
    """Return the ids (r, c) of a tile of the masks' cells (Q, h, w)."""
    if cells.device.type != "cpu":
        scores = _scores(upsample_tile(cells, rows, columns), shares)
        return scores.max(0).indices.to(torch.uint8)
    most = cells.flatten(1).amax(1).sigmoid()[:, None] * shares  # (Q, K) that a mask adds
    least_first = most.amax(1).argsort()
    few = int((most[least_first].cumsum(0).amax(1) < _LEFT_OUT).sum())
    out, kept = least_first[:few], least_first[few:]
    scores = _scores(upsample_tile(cells[kept], rows, columns), shares[kept])  # (K, r, c)
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
    """Return the scores (K, ...) of upsampled logits (Q, ...), which are overwritten, and shares (Q, K)."""
    return (shares.T @ pixels.sigmoid_().flatten(1)).unflatten(1, pixels.shape[1:])
