"""Objects of the masks of queries: instances that may overlap, and segments that do not."""

from collections.abc import Collection

from torch import Tensor

from dinoseg.core.objects import Objects


def find_instances(
    class_logits: Tensor,
    mask_logits: Tensor,
    size: tuple[int, int],
    valid: tuple[float, float],
    num_classes: int,
    things: Collection[int],
) -> list[Objects]:
    """Return the instances of each image, best first."""
    raise NotImplementedError


def find_segments(
    class_logits: Tensor,
    mask_logits: Tensor,
    size: tuple[int, int],
    valid: tuple[float, float],
    num_classes: int,
    things: Collection[int],
) -> list[Objects]:
    """Return the segments of each image, which do not overlap."""
    raise NotImplementedError
