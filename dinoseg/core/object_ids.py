"""Objects of an image as whole numbers: number, class and crowd flag of one object in 31 bits; imports no torch.

Bits 0 to 19 hold the number of the object in its image, from 1 on; bits 20 to 29 its class id; bit 30 is set for a
crowd, an area of objects that were not separated. 0 is no object. All functions take whole numbers, arrays or tensors.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from dinoseg.utils.errors import UserError

OBJECTS = "objects"  # name of the map in a sample
CROWD = 1 << 30
MAX_CLASSES = 1023
MAX_OBJECTS = 2**20 - 1
_CLASS_SHIFT = 20


def encode_object(number: int, class_id: int, *, crowd: bool = False) -> int:
    """Return the value of an object: its number from 1, its class id, and whether it is a crowd."""
    return number | class_id << _CLASS_SHIFT | (CROWD if crowd else 0)


def object_numbers(values: Any) -> Any:
    """Return the numbers of objects in their image; 0 where there is none."""
    return values & MAX_OBJECTS


def object_classes(values: Any) -> Any:
    """Return the class ids of objects; where there is none, the id is 0 too."""
    return values >> _CLASS_SHIFT & MAX_CLASSES


def crowd_flags(values: Any) -> Any:
    """Return 1 for crowds, else 0."""
    return values >> 30 & 1


def check_object_range(objects: int, where: object) -> None:
    """Refuse more objects of an image than an `ObjectMap` can hold.

    Args:
        objects: their number.
        where: the image, for the message.

    Raises:
        UserError: there are too many.
    """
    if objects > MAX_OBJECTS:
        raise UserError(f"{where}: {objects} objects; an image holds at most {MAX_OBJECTS}. Divide it.")


def stack_objects(objects: Iterable[tuple[int, np.ndarray]], size: tuple[int, int]) -> np.ndarray:
    """Return objects as layers (N, H, W) int32, each object in the first layer where its pixels are free.

    Args:
        objects: value of each, and its pixels as indices (M,) of the flat image; one without pixels is left out.
        size: (H, W) of the image.
    """
    layers: list[np.ndarray] = []
    for value, pixels in objects:
        if not pixels.size:
            continue
        layer = next((each for each in layers if not each[pixels].any()), None)
        if layer is None:
            layer = np.zeros(size[0] * size[1], np.int32)
            layers.append(layer)
        layer[pixels] = value
    return np.array(layers, np.int32).reshape(-1, *size)
