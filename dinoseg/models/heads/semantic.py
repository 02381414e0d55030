"""Semantic maps of mask classification: class scores per pixel from Q masks and their classes."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import MaskOutputs, WeightedMasks
from dinoseg.utils.precision import at_least_float32

_AT_ONCE = 2**25  # upsampled mask values per chunk: 128 MiB, plus the same for their sigmoid


def weighted_masks(outputs: MaskOutputs, no_object: bool = True) -> WeightedMasks:
    """Return the masks and class probabilities that `semantic_map` mixes, in float32 or better."""
    masks = at_least_float32(outputs.mask_logits)
    shares = outputs.class_logits.to(masks.dtype).softmax(dim=-1)  # (B, Q, K + 1)
    return WeightedMasks(masks, shares[..., :-1] if no_object else shares)


def semantic_map(
    outputs: MaskOutputs,
    size: tuple[int, int],
    valid: tuple[float, float],
    no_object: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return class scores (B, K, H, W), float32: class times mask probability, summed over the queries.

    Class probabilities are a softmax over all columns, after which the no-object column is dropped. Mask
    probabilities are the sigmoid of the mask logits, which are upsampled first (Cheng et al., arXiv 2107.06278). The
    computation runs in float32, a few queries at a time, and is recomputed in the backward pass. Beyond the result,
    the memory does not grow with the number of queries.

    Args:
        outputs: of the last layer; `aux` is not used.
        size: (H, W) of the map.
        valid: share of the masks' height and width that lies on the image.
        no_object: whether the last column of the class logits is "no object".
        dtype: precision to which probabilities and scores are rounded; products are summed in float32.
    """
    # products of two bfloat16 numbers are exact in float32, where matrix units sum them too
    round_to_dtype = partial(_round_to, dtype=dtype)
    with torch.autocast(outputs.mask_logits.device.type, enabled=False):
        masks, classes = weighted_masks(outputs, no_object)
        images = list(zip(round_to_dtype(classes), masks, strict=True))
        if torch.is_grad_enabled():
            return round_to_dtype(torch.stack([_image_map(*image, size, valid, dtype) for image in images]))
        maps = classes.new_zeros(len(images), classes.shape[2], *size)
        for scores, image in zip(maps, images, strict=True):
            for part_classes, part_masks in _parts(*image, size):
                pixels = _pixels(part_masks, size, valid, dtype)
                scores.flatten(1).addmm_(part_classes.T, pixels.flatten(1))  # in place: no second map in memory
    return round_to_dtype(maps)


def _image_map(
    classes: Tensor, masks: Tensor, size: tuple[int, int], valid: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """Return the map (K, H, W) of one image's classes (Q, K) and masks (Q, h, w), with gradients."""
    scores = classes.new_zeros(classes.shape[1], *size)
    for part in _parts(classes, masks, size):
        scores = scores + checkpoint(_sum, *part, size, valid, dtype, use_reentrant=False)
    return scores


def _parts(classes: Tensor, masks: Tensor, size: tuple[int, int]) -> Iterable[tuple[Tensor, Tensor]]:
    """Return an image's classes (Q, K) and masks (Q, h, w) in chunks of a few queries."""
    at_once = max(1, _AT_ONCE // (size[0] * size[1]))
    return zip(classes.split(at_once), masks.split(at_once), strict=True)


def _sum(
    classes: Tensor, masks: Tensor, size: tuple[int, int], valid: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    return torch.einsum("qk,qhw->khw", classes, _pixels(masks, size, valid, dtype))


def _pixels(masks: Tensor, size: tuple[int, int], valid: tuple[float, float], dtype: torch.dtype) -> Tensor:
    return _round_to(upsample(masks[None], size, valid)[0].sigmoid(), dtype)  # (q, H, W)


def _round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values rounded to a dtype of at most their own precision, in their own dtype."""
    return values if dtype == torch.float32 else values.to(dtype).to(values.dtype)
