"""The semantic map of mask classification: what Q masks and their classes say about each pixel."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dinoseg.geometry import upsample
from dinoseg.shapes import MaskOutputs

_AT_ONCE = 2**25  # numbers of the upsampled masks held at a time: 128 MiB


def semantic_map(
    outputs: MaskOutputs, size: tuple[int, int], valid: tuple[float, float], no_object: bool = True
) -> Tensor:
    """Return class scores (B, K, H, W), float32: the sum over the queries of class probability times mask probability.

    Class probabilities are a softmax over all columns, of which the no-object column is then dropped; mask
    probabilities the sigmoid of the mask logits, upsampled first (Cheng et al., arXiv 2107.06278). Always computed in
    float32, a few queries at a time, which also are recomputed in the backward pass: the memory needed beside
    the result does not grow with the number of queries.

    Args:
        outputs: of the last layer; `aux` is not read.
        size: (H, W) of the map.
        valid: share of the masks' height and width that lies on the image.
        no_object: whether the last column of the class logits says "no object".
    """
    with torch.autocast(outputs.mask_logits.device.type, enabled=False):
        classes = outputs.class_logits.float().softmax(dim=-1)  # (B, Q, K + 1)
        classes = classes[..., :-1] if no_object else classes
        maps = [
            _image_map(image_classes, image_masks, size, valid)
            for image_classes, image_masks in zip(classes, outputs.mask_logits.float(), strict=True)
        ]
    return torch.stack(maps)


def _image_map(classes: Tensor, masks: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    """Return the map (K, H, W) of one image's (Q, K) and (Q, h, w)."""
    at_once = max(1, _AT_ONCE // (size[0] * size[1]))
    scores = classes.new_zeros(classes.shape[1], *size)
    for part_classes, part_masks in zip(classes.split(at_once), masks.split(at_once), strict=True):
        part = (part_classes, part_masks, size, valid)
        more = checkpoint(_sum, *part, use_reentrant=False) if torch.is_grad_enabled() else _sum(*part)
        scores = scores + more
    return scores


def _sum(classes: Tensor, masks: Tensor, size: tuple[int, int], valid: tuple[float, float]) -> Tensor:
    pixels = upsample(masks[None], size, valid)[0].sigmoid()  # (q, H, W)
    return torch.einsum("qk,qhw->khw", classes, pixels)
