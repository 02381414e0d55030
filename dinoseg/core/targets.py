"""Target masks of mask classification: what queries are matched with, such as the classes or objects of an image."""

from dataclasses import dataclass

import torch
from torch import Tensor

UNLABELLED = -100  # id of pixels without a label; the default `ignore_index` of torch's cross_entropy
NO_TARGET = -1


@dataclass
class MaskTargets:
    """Target masks of B images, at most M of each.

    A target is named by a number, the same wherever its mask is. Masks of objects may overlap, and then lie in
    different layers; each one lies in a single layer.

    Args:
        ids: (B, N, H, W) int32 or int64, N at least 1, the target of each pixel and layer; NO_TARGET where there is
            none. Pixels without a label are UNLABELLED in the first layer, and belong to no target.
        present: (B, M) int64, the targets of each image, in any order and padded with NO_TARGET.
        classes: (B, M) int64, the class id of each; of the padding, NO_TARGET.
        labelled: (B,) bool, whether an image has a pixel with a label.
    """

    ids: Tensor
    present: Tensor
    classes: Tensor
    labelled: Tensor


def class_targets(mask: Tensor, num_classes: int, ignore_index: int) -> MaskTargets:
    """Return each class of the mask (B, H, W) of an image as a target, whose number is the class id."""
    ids = label_ids(mask, ignore_index)
    flat = ids.flatten(1)
    present = torch.zeros(len(flat), num_classes + 1, dtype=torch.bool, device=flat.device)
    present = present.scatter_(1, flat.where(flat != UNLABELLED, num_classes), True)[:, :num_classes]
    numbers = list_present(present)
    return MaskTargets(ids[:, None], numbers, numbers, present.any(1))


def label_ids(mask: Tensor, ignore_index: int) -> Tensor:
    """Return the class ids of a mask as int64, with UNLABELLED instead of `ignore_index`."""
    ids = mask.long()
    return ids.masked_fill(ids == ignore_index, UNLABELLED)


def list_present(present: Tensor, *, shorten: bool = False) -> Tensor:
    """Return the numbers (B, M) that are present (B, T) bool in each image, padded with NO_TARGET.

    On a CPU or with `shorten`, they are ascending and M is the maximum count of any image. Elsewhere M is T, since a
    count would synchronise the device.
    """
    most = present.shape[1]
    numbers = torch.arange(most, device=present.device).where(present, most)
    if shorten or numbers.device.type == "cpu":
        longest = int(present.sum(1).amax()) if len(numbers) else 0
        numbers = numbers.sort(1).values[:, :longest]
    return numbers.where(numbers < most, NO_TARGET)
