"""Resizing of a mask to its image's size, if the rule allows it; imports no torch."""

import cv2
import numpy as np

from dinoseg.utils.errors import UserError

_PROPORTIONS = 0.05  # largest relative difference in aspect ratio for which a mask is resized


def fit_mask(mask: np.ndarray, size: tuple[int, int], rule: str, *, image: object, path: object) -> np.ndarray:
    """Return class ids (H, W) at `size`, the (H, W) of their image.

    Args:
        mask: class ids of any size.
        size: (H, W) of the image.
        rule: `error`, or `resize_mask`: nearest neighbour, if the aspect ratios are similar.
        image: name of the image in a message.
        path: name or path of the mask in a message.

    Raises:
        UserError: the sizes differ, and the rule does not allow resizing.
    """
    if mask.shape == size:
        return mask
    sizes = f"{image} is {size[1]} x {size[0]} (width x height), its mask {path} is {mask.shape[1]} x {mask.shape[0]}."
    height, width = size[0] / mask.shape[0], size[1] / mask.shape[1]
    if abs(height / width - 1) > _PROPORTIONS:
        raise UserError(
            f"{sizes} Make them equal, or remove the pair: their aspect ratios differ by more than {_PROPORTIONS:.0%}, "
            "so resizing cannot align them. Was one of them cropped or rotated? Images are turned by their EXIF "
            "orientation, masks are not."
        )
    if rule == "error":
        raise UserError(f"{sizes} Make them equal, or resize the mask: data.reader.masks.on_size_mismatch=resize_mask.")
    # pixel centres aligned: plain INTER_NEAREST would shift the mask by up to half a pixel
    return cv2.resize(mask, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)
