"""Target masks of queries: the objects of an image, and the classes of its stuff."""

from collections.abc import Collection

import torch
from torch import Tensor

from dinoseg.core.object_ids import crowd_flags, object_classes, object_numbers
from dinoseg.core.targets import NO_TARGET, UNLABELLED, MaskTargets, list_present
from dinoseg.utils.devices import to_device


def object_targets(
    mask: Tensor, objects: Tensor, num_classes: int, ignore_index: int, stuff: Collection[int] = ()
) -> MaskTargets:
    """Return each object of an image but its crowds as a target, and each class of `stuff`.

    A pixel that the mask ignores, or that a crowd covers, has no label unless an object covers it. Stuff covers no
    pixel of an object or a crowd. Crowds are dropped as by tue-mps/eomt (datasets/transforms.py).

    Args:
        mask: class ids (B, H, W) uint8.
        objects: (B, N, H, W) int32 of an `ObjectMap`.
        num_classes: K.
        ignore_index: id of pixels without a label.
        stuff: ids of the classes whose pixels are one target each.
    """
    if not objects.shape[1]:
        objects = objects.new_zeros(len(mask), 1, *mask.shape[-2:])
    is_crowd = crowd_flags(objects) == 1
    values = objects.masked_fill(is_crowd, 0)
    numbers, owners = object_numbers(values), object_classes(values)
    most = int(numbers.amax()) if numbers.numel() else 0
    # the classes of stuff are numbered behind the objects
    is_stuff = torch.tensor([each in stuff and each != ignore_index for each in range(256)])
    is_stuff_pixel = to_device(is_stuff, mask.device)[mask.long()] & (objects == 0).all(1)
    numbers[:, 0] = torch.where(is_stuff_pixel, 1 + most + mask.int(), numbers[:, 0])
    owners[:, 0] = torch.where(is_stuff_pixel, mask.int(), owners[:, 0])
    classes = torch.full((len(mask), 1 + most + num_classes), NO_TARGET, device=mask.device)
    classes.scatter_reduce_(1, numbers.flatten(1).long(), owners.flatten(1).long(), "amax")
    classes[:, 0] = NO_TARGET
    is_ignored = ~(values > 0).any(1) & ((mask == ignore_index) | is_crowd.any(1))
    ids = torch.where(numbers > 0, numbers, NO_TARGET)
    ids[:, 0].masked_fill_(is_ignored, UNLABELLED)
    present = list_present(classes != NO_TARGET, shorten=True)
    found = classes.gather(1, present.clamp(min=0)).masked_fill(present == NO_TARGET, NO_TARGET)
    return MaskTargets(ids, present, found, ~is_ignored.flatten(1).all(1))
