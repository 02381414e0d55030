"""Target masks of mask classification: what queries are matched with, such as the classes or objects of an image."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class MaskTargets:
    """Target masks of B images, at most M of each.

    A target is named by a number, the same wherever its mask is. Masks of objects may overlap, and then lie in
    different layers; each one lies in a single layer.

    Args:
        ids: (B, N, H, W) int64, the target of each pixel and layer; NO_TARGET where there is none.
        present: (B, M) int64, the targets of each image, ascending and padded with NO_TARGET.
        classes: (B, M) int64, the class id of each; of the padding, NO_TARGET.
        ignored: (B, H, W) bool, pixels without a label.
    """

    ids: Tensor
    present: Tensor
    classes: Tensor
    ignored: Tensor


NO_TARGET = -1
