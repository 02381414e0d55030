"""A mask brought to the size of its image, where the rule allows it; imports no torch."""

import cv2
import numpy as np

from dinoseg.utils.errors import UserError

_PROPORTIONS = 0.05  # a resized mask may differ so much from its image's proportions


def fit_mask(mask: np.ndarray, size: tuple[int, int], rule: str, *, image: object, path: object) -> np.ndarray:
    """Return class ids (H, W) at `size`, the (H, W) of their image.

    Args:
        mask: class ids of any size.
        size: of the image.
        rule: `error`, or `resize_mask`: by nearest neighbour, if the proportions are alike.
        image: what the image is called in a message.
        path: what the mask is called, or its path.

    Raises:
        UserError: the sizes differ, and the rule does not mend it.
    """
    if mask.shape == size:
        return mask
    sizes = f"{image} is {size[1]} x {size[0]} (width x height), its mask {path} is {mask.shape[1]} x {mask.shape[0]}."
    if rule == "error":
        raise UserError(f"{sizes} Make them equal, or resize the mask: data.reader.masks.on_size_mismatch=resize_mask.")
    height, width = size[0] / mask.shape[0], size[1] / mask.shape[1]
    if abs(height / width - 1) > _PROPORTIONS:
        raise UserError(
            f"{sizes} Their proportions differ by more than {_PROPORTIONS:.0%}, so resizing would not make "
            "them fit (was one of them turned or cropped?). Correct or remove the pair."
        )
    # pixel centres aligned: plain INTER_NEAREST would shift the mask by up to half a pixel
    return cv2.resize(mask, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)
