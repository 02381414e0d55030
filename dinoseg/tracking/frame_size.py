"""Frames at the size that the backbone sees: a multiple of its patch, so that the grid covers the frame exactly."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from dinoseg.errors import UserError
from dinoseg.tracking.propagation.settings import Settings


def input_size(size: tuple[int, int], settings: Settings, patch_size: int) -> tuple[int, int]:
    """Return the (H, W) to which a frame of `size` is resized.

    The shorter side comes first: `settings.short`, rounded to a multiple of the patch size; the longer one grows in
    proportion to it, and is rounded to `settings.long_multiple`. Each is at least one multiple.

    Raises:
        UserError: `long_multiple` is no multiple of the patch size.
    """
    multiple = settings.long_multiple or patch_size
    if multiple % patch_size:
        raise UserError(
            f"tracker.long_multiple={multiple} is no multiple of the backbone's patch size, {patch_size}: the grid "
            "would reach beyond the frame. Give tracker.long_multiple=null, which stands for the patch size."
        )
    short, long = min(size), max(size)
    new_short = _rounded(settings.short or short, 1, patch_size, settings.rounding)
    new_long = _rounded(long * (new_short if settings.short else short), short, multiple, settings.rounding)
    return (new_short, new_long) if size[0] <= size[1] else (new_long, new_short)


def resize(frame: np.ndarray, size: tuple[int, int], resample: str) -> np.ndarray:
    """Return a frame (H, W, 3) uint8 at `size` (H, W), "bilinear" as OpenCV does it, "bicubic" as Pillow does."""
    height, width = size
    if frame.shape[:2] == (height, width):
        return frame
    if resample == "bilinear":
        return np.asarray(cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR))
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def one_size(
    size: tuple[int, int] | None, frames: Sequence[np.ndarray], masks: Sequence[np.ndarray | None] = ()
) -> tuple[int, int]:
    """Return the (H, W) that all frames and masks of a video share.

    Args:
        size: of the video's first frame; None: the first of these is it.
        frames: (H, W, 3), at least one.
        masks: (H, W) or None.

    Raises:
        UserError: one is of another size.
    """
    height, width = size or frames[0].shape[:2]
    shapes = [("frame", frame.shape[:2]) for frame in frames]
    shapes += [("mask", mask.shape) for mask in masks if mask is not None]
    for what, shape in shapes:
        if shape != (height, width):
            raise UserError(
                f"A {what} is {' x '.join(map(str, shape))} pixels, and the first frame {height} x {width} (H x W). "
                "All of a video need one size: resize it."
            )
    return height, width


def _rounded(dividend: int, divisor: int, multiple: int, rounding: str) -> int:
    """Return dividend / divisor as a multiple: whole numbers alone, since a float may fall beside an exact one."""
    count = dividend // (divisor * multiple) if rounding == "down" else -(-dividend // (divisor * multiple))
    return max(1, count) * multiple
