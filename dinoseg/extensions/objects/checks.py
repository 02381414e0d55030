"""Checks of the data that a task of objects is trained on."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from dinoseg.core.object_ids import OBJECTS, crowd_flags
from dinoseg.core.sample_maps import MapKind, ObjectMap
from dinoseg.core.shapes import SegmentationData
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.utils.errors import UserError

# options of the group `data`, the most usual first
WITH_OBJECTS = (
    *("folder_instances", "coco_instances", "coco_panoptic", "yolo_instances", "labelme_instances"),
    *("cityscapes_instances", "sarrarp_instances"),
)


def check_maps(name: str, kinds: Mapping[str, MapKind], classes: Sequence[str], things: Collection[int]) -> None:
    """Refuse data whose objects are not those of some things.

    Args:
        name: of the data, for messages.
        kinds: of their maps, by name.
        classes: names in the order of their ids.
        things: ids of the classes that have objects.

    Raises:
        UserError: there are no objects, or those of other classes.
    """
    kind = kinds.get(OBJECTS)
    if not isinstance(kind, ObjectMap):
        option = name.split()[0].removeprefix("data=")
        options = sorted(WITH_OBJECTS, key=lambda each: not each.startswith(f"{option}_"))
        raise UserError(
            f"{name} has no objects, which a task of objects is trained on. Choose data={options[0]}, or other data "
            f"with objects: {', '.join(options[1:])}; or task=semantic."
        )
    if {*kind.things} != {*things}:
        raise UserError(
            f"{name} has objects of other classes than the task. Name them: data.things="
            f"[{','.join(classes[each] for each in kind.things)}]; or as `things` in classes.yaml."
        )


def check_objects(name: str, data: SegmentationData) -> None:
    """Refuse data without any object that is not a crowd; images are read up to the first one that has.

    Args:
        name: of the data, for messages.
        data: of a split; one other than a `PairDataset` is not checked.

    Raises:
        UserError: there is no object, or a file is unreadable.
    """
    if not isinstance(data, PairDataset):
        return
    sources = [pair.objects for pair in data.pairs if pair.objects is not None and pair.objects.count != 0]
    values = (np.unique(source.read()) for source in sources)
    if not any((each[crowd_flags(each) == 0] > 0).any() for each in values):
        raise UserError(
            f"{name}: no image has an object, or all are crowds, so that there is nothing to "
            "find. Check data.things, data.background, data.instances or the annotations; of crowds that are "
            "objects, set data.reader.shapes.crowds=object; or choose task=semantic."
        )
