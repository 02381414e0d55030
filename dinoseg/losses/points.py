"""Sampling of masks and labels at points (x, y): shares of the image's width and height, 0 at the top left."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.losses.labelled import UNLABELLED


def random_points(count: int, num_points: int, device: torch.device) -> Tensor:
    """Return uniform points (count, P, 2)."""
    return torch.rand(count, num_points, 2, device=device)


def sample_logits(maps: Tensor, points: Tensor, valid: tuple[float, float]) -> Tensor:
    """Return (N, C, P): maps (N, C, h, w) sampled bilinearly at points (N, P, 2), as in `geometry.upsample`.

    `valid` is the share of the maps' height and width that the image covers. Beyond the centres of the outermost
    cells the border value is used, instead of fading to a logit of 0.
    """
    x, y = points.to(maps.dtype).unbind(-1)
    grid = 2 * torch.stack([x * valid[1], y * valid[0]], dim=-1) - 1
    return sample_maps(maps, grid[:, None])[:, :, 0]


def sample_maps(maps: Tensor, places: Tensor) -> Tensor:
    """Return maps (N, C, h, w) sampled bilinearly at places (N, r, c, 2), x and y in -1..1 from border to border.

    The result is (N, C, r, c). Beyond the centres of the outermost cells their value is used. On MPS the places are
    clamped to these centres, since its `grid_sample` does not support border padding in torch 2.9.
    """
    padding = "border"
    if maps.device.type == "mps":
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
) -> Tensor:
    """Return points (N, P, 2): some where the mask is most uncertain, the rest uniform.

    Of oversample * P uniform points, the importance * P with the logit nearest to 0 are selected (Kirillov et al.,
    arXiv 1912.08193, section 3.1). Unlabelled points are selected last, since they give no training signal.

    Args:
        masks: logits (N, h, w).
        target: class ids (B, H, W).
        image: image index of each mask (N,).
        valid: see `sample_logits`.
        num_points: P.
        oversample: at least 1.
        importance: share, in [0, 1].
    """
    candidates = random_points(len(masks), int(oversample * num_points), masks.device)
    certainty = sample_logits(masks[:, None], candidates, valid)[:, 0].abs()
    certainty = certainty.masked_fill(sample_labels(target, image, candidates) == UNLABELLED, torch.inf)
    num_uncertain = int(importance * num_points)
    chosen = certainty.topk(num_uncertain, largest=False).indices
    uncertain = candidates.take_along_dim(chosen[..., None], dim=1)
    return torch.cat([uncertain, random_points(len(masks), num_points - num_uncertain, masks.device)], dim=1)
