"""Arithmetic without torch: input size of a backbone, and evenly spaced indices."""

import numpy as np

Size = tuple[int, int]  # rows, columns


def backbone_size(size: Size, scale: float, longest: int | None) -> Size:
    """Return the (H, W) at which an image of `size` enters the backbone, at least one pixel a side."""
    factor = scale * (min(1.0, longest / max(size)) if longest else 1.0)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def with_shorter_side(size: Size, shorter: int) -> Size:
    """Return the (H, W) of an image of `size` resized so that its shorter side has `shorter` pixels.

    The other side is int(shorter * longer / shortest + 0.5), as in mmsegmentation and facebookresearch/dinov3
    (dinov3/eval/segmentation/transforms.py). tue-mps/eomt rounds halves to even, which differs only there.
    """
    low, high = min(size), max(size)
    longer = max(1, (2 * shorter * high + low) // (2 * low))
    return (shorter, longer) if size[0] <= size[1] else (longer, shorter)


def reduced_longest(size: Size, longest: int | None, typical: int, largest: int) -> int | None:
    """Return `longest` for an image of `size`, or `typical` if the image is larger than any in training.

    Args:
        size: (H, W) of the image, which `longest` limits before it is compared.
        longest: configured limit of the longer side, for images at the scale of the training; None: no limit.
        typical: longer side of the training images.
        largest: maximum longer side of the training and validation images.
    """
    return typical if min(max(size), longest or max(size)) > largest else longest


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return at most `count` different indices below `length`, in order, from the first to the last.

    A single one is the first.
    """
    return [round(position) for position in np.linspace(0, length - 1, min(count, length)).tolist()]
