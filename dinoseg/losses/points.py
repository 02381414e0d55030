"""Sampling of masks and labels at points (x, y): shares of the image's width and height, 0 at the top left."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.targets import UNLABELLED


def random_points(count: int, num_points: int, device: torch.device) -> Tensor:
    """Return uniform points (count, P, 2)."""
    return torch.rand(count, num_points, 2, device=device)


def sample_logits(maps: Tensor, points: Tensor, valid: tuple[float, float], *, fading: bool = False) -> Tensor:
    """Return (N, C, P): maps (N, C, h, w) sampled bilinearly at points (N, P, 2), as in `geometry.upsample`.

    `valid` is the share of the maps' height and width that the image covers. Beyond the centres of the outermost
    cells the border value is used or, with `fading`, fades to a logit of 0.
    """
    x, y = points.to(maps.dtype).unbind(-1)
    # `grid_sample` counts from -1 to 1 over the whole map, of which the image covers the first `valid`
    grid = 2 * torch.stack([x * valid[1], y * valid[0]], dim=-1) - 1
    return sample_maps(maps, grid[:, None], fading=fading)[:, :, 0]


def sample_maps(maps: Tensor, places: Tensor, *, fading: bool = False) -> Tensor:
    """Return maps (N, C, h, w) sampled bilinearly at places (N, r, c, 2), x and y in -1..1 from border to border.

    The result is (N, C, r, c). Beyond the centres of the outermost cells their value is used or, with `fading`, fades
    to 0 at one cell's distance. On MPS the places are clamped to these centres, since its `grid_sample` does not
    support border padding in torch 2.9.
    """
    padding = "zeros" if fading else "border"
    if maps.device.type == "mps" and not fading:
        axes = zip(places.unbind(-1), (maps.shape[-1], maps.shape[-2]), strict=True)
        places = torch.stack([axis.clamp(1 / cells - 1, 1 - 1 / cells) for axis, cells in axes], dim=-1)
        padding = "zeros"
    return F.grid_sample(maps, places, mode="bilinear", padding_mode=padding, align_corners=False)


def sample_labels(target: Tensor, image: Tensor, points: Tensor) -> Tensor:
    """Return the class ids (N, P) of the pixels at points (N, P, 2), for image indices (N,) into target (B, H, W)."""
    height, width = target.shape[-2:]
    # points on the right or lower edge (share 1) belong to the last pixel
    x = (points[..., 0] * width).long().clamp(max=width - 1)
    y = (points[..., 1] * height).long().clamp(max=height - 1)
    return target[image[:, None], y, x]


def sample_membership(target: Tensor, image: Tensor, points: Tensor, classes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the share (N, P, M) of each of the `classes` (N, M) at points (N, P, 2), sampled bilinearly.

    It is what `grid_sample` with zero padding reads from the mask of a class, without building these masks.

    Args:
        target: class ids (B, H, W).
        image: image index of each row of points (N,).
        points: (N, P, 2).
        classes: class ids (N, M); -1 occurs nowhere.
        dtype: of the result.
    """
    height, width = target.shape[-2:]
    # pixel centres lie at half numbers: the first one is position 0
    x, y = (points[..., axis].to(dtype) * length - 0.5 for axis, length in ((0, width), (1, height)))
    left, top = x.floor(), y.floor()
    across, down = x - left, y - top
    shares = points.new_zeros(*points.shape[:2], classes.shape[1], dtype=dtype)
    # the four pixels around a point, each with its bilinear weight, 0 outside the image as by zero padding
    for row, of_row in ((top.long(), 1 - down), (top.long() + 1, down)):
        for column, of_column in ((left.long(), 1 - across), (left.long() + 1, across)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            ids = target[image[:, None], row.clamp(0, height - 1), column.clamp(0, width - 1)]
            shares += (inside * of_row * of_column)[..., None] * (ids[..., None] == classes[:, None])
    return shares


@torch.no_grad()
def uncertain_points(
    masks: Tensor,
    target: Tensor,
    image: Tensor,
    valid: tuple[float, float],
    *,
    num_points: int,
    oversample: float,
    importance: float,
    excluded: bool = True,
    fading: bool = False,
) -> Tensor:
    """Return points (N, P, 2): some where the mask is most uncertain, the rest uniform.

    Of oversample * P uniform points, the importance * P with the logit nearest to 0 are selected (Kirillov et al.,
    arXiv 1912.08193, section 3.1). If unlabelled points are `excluded`, which then give no training signal, they are
    selected last.

    Args:
        masks: logits (N, h, w).
        target: class ids (B, H, W).
        image: image index of each mask (N,).
        valid: see `sample_logits`.
        num_points: P.
        oversample: at least 1.
        importance: share, in [0, 1].
        excluded: whether unlabelled points give no training signal.
        fading: see `sample_logits`.
    """
    candidates = random_points(len(masks), int(oversample * num_points), masks.device)
    certainty = sample_logits(masks[:, None], candidates, valid, fading=fading)[:, 0].abs()
    if excluded:
        certainty = certainty.masked_fill(sample_labels(target, image, candidates) == UNLABELLED, torch.inf)
    # the rest is uniform, so that certain regions stay trained: a mask in the wrong place is certain there
    num_uncertain = int(importance * num_points)
    chosen = certainty.topk(num_uncertain, largest=False).indices
    uncertain = candidates.take_along_dim(chosen[..., None], dim=1)
    return torch.cat([uncertain, random_points(len(masks), num_points - num_uncertain, masks.device)], dim=1)
