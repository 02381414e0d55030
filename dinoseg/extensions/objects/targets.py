"""Target masks of queries: the objects of an image, and the classes of its stuff."""

from collections.abc import Collection

from torch import Tensor

from dinoseg.core.targets import MaskTargets


def object_targets(mask: Tensor, objects: Tensor, ignore_index: int) -> MaskTargets:
    """Return the objects (B, N, H, W) of an `ObjectMap` but its crowds, whose pixels have no label."""
    raise NotImplementedError


def panoptic_targets(mask: Tensor, objects: Tensor, ignore_index: int, things: Collection[int]) -> MaskTargets:
    """Return the objects of things as `object_targets`, and each class of stuff of the mask (B, H, W)."""
    raise NotImplementedError
