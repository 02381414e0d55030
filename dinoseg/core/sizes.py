"""Arithmetic without torch: the input size of a backbone, and evenly spaced indices."""

import numpy as np

Size = tuple[int, int]  # rows, columns


def backbone_size(size: Size, scale: float, longest: int | None) -> Size:
    """Return the (H, W) at which an image of `size` enters the backbone, at least one pixel a side."""
    factor = scale * (min(1.0, longest / max(size)) if longest else 1.0)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def kept_longest(size: Size, longest: int | None, typical: int, largest: int) -> int | None:
    """Return what `longest` becomes for a picture of `size`: the typical one of training where it is larger than any.

    Args:
        size: of the picture.
        longest: as the config says, for pictures of the training's scale.
        typical: longer side of the training's pictures.
        largest: the longer side above which it is larger than any that was trained or validated on.
    """
    return typical if min(max(size), longest or max(size)) > largest else longest


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return at most `count` different indices below `length`, in order: the first, and of several the last."""
    return [round(place) for place in np.linspace(0, length - 1, min(count, length)).tolist()]
