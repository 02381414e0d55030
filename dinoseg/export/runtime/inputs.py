"""Conversion of any image source (path, array, tensor, Pillow image) to an array (H, W, C); imports no torch."""

import logging
from collections.abc import Iterable, Iterator
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinoseg.core.channels import PixelFormat
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import find_files, is_pattern
from dinoseg.utils.images import as_rgb
from dinoseg.utils.levels import WHITE, to_levels

logger = logging.getLogger(__name__)
ON_ERROR = ("stop", "skip")
_ACCEPTED = "Give a path, an array (H, W, 3), a torch tensor (3, H, W), a Pillow image, or a list of them."
_SLACK = 0.5 / 255  # resizing of floats rounds: 1.0000001 is white

Picture = tuple[Path | None, np.ndarray]  # its file, if any, and (H, W, C), uint8 RGB or in the model's format


def is_one(source: Any) -> bool:
    """Return whether a source is a single image, not a folder, pattern, stack or list."""
    if isinstance(source, str | PathLike):
        return not (_is_folder(source) or is_pattern(source))
    return isinstance(source, Image.Image) or (_is_array(source) and len(source.shape) <= 3)


def is_many_files(source: Any) -> bool:
    """Return whether a source is a folder or a pattern: its files are read one after the other."""
    return isinstance(source, str | PathLike) and not is_one(source)


def pictures(
    source: Any,
    *,
    on_error: str = "stop",
    pixels: PixelFormat = PixelFormat(),  # noqa: B008 (frozen)
) -> Iterator[Picture]:
    """Return an iterator over the images of a source, in order; files in natural order: x2 before x10.

    Args:
        source: an image; a folder (without its subfolders and hidden files) or a pattern such as `a/*.png`; an
            array (B, H, W, 3) or a tensor (B, 3, H, W); or any iterable of images.
        on_error: `stop` at an invalid image, or `skip` it with a warning.
        pixels: format of the images.

    Raises:
        UserError: if an image is invalid or there is none; the message names the accepted kinds.
    """
    if on_error not in ON_ERROR:
        raise UserError(f"on_error={on_error} is unknown. Choose one of {', '.join(ON_ERROR)}.")
    return _read(_ones(source, pixels), on_error, pixels)


def _read(ones: Iterable[Any], on_error: str, pixels: PixelFormat) -> Iterator[Picture]:
    for number, one in enumerate(ones):
        try:
            picture = _picture(one, f"image {number}", pixels)
        except UserError as error:
            if on_error == "stop":
                raise
            logger.warning("left out: %s", error)
            continue
        yield picture


def as_pixels(array: np.ndarray, name: str, *, channels_first: bool = False) -> np.ndarray:
    """Convert an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of levels to (H, W, 3) uint8; alpha is dropped.

    Floats are levels in 0..1, uint16 in 0..65535.

    Args:
        array: the levels, RGB.
        name: begins an error message.
        channels_first: whether its axes are (C, H, W), as torch's.

    Raises:
        UserError: if it has other axes or numbers.
    """
    if channels_first and array.ndim == 3:
        if array.shape[0] not in (1, 3, 4):
            raise UserError(f"{name} is a tensor {list(array.shape)}: give (3, H, W), as tensor.permute(2, 0, 1) does.")
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        hint = " Transpose it: array.transpose(1, 2, 0)." if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise UserError(f"{name} is an array of {list(array.shape)}: give (H, W, 3) RGB, or (H, W) grey.{hint}")
    if not array.size:
        raise UserError(f"{name} is an array of {list(array.shape)}, which holds no pixels.")
    levels = _levels(array, name)
    levels = levels[..., None] if levels.ndim == 2 else levels
    rgb = levels.repeat(3, axis=2) if levels.shape[2] == 1 else levels[..., :3]
    return np.ascontiguousarray(rgb)


def _as_channels(array: np.ndarray, name: str, pixels: PixelFormat, *, channels_first: bool) -> np.ndarray:
    """Convert an array to (H, W, C), uint8 or uint16.

    An array (H, W, C) has the values of a file; without a range, floats are 0..1. A tensor (C, H, W) has levels, as the
    items of a dataset.
    """
    channels = pixels.channels
    value_range = None if channels_first else pixels.value_range
    if array.ndim == 2:
        array = array[..., None]
    elif channels_first and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != channels or not array.size:
        wanted = f"({channels}, H, W)" if channels_first else f"(H, W, {channels})"
        raise UserError(f"{name} is of {list(array.shape)} (H, W, C): give {wanted}, the channels of this model.")
    if value_range is None and np.issubdtype(array.dtype, np.floating):
        check_levels(float(array.min()), float(array.max()), name)
        array = np.round(array.clip(0, 1) * WHITE).astype(np.uint16)
    if array.dtype not in (np.uint8, np.uint16) and (value_range is None or array.dtype.kind not in "uif"):
        hint = " Give the values of a file as a NumPy array (H, W, C)." if channels_first else ""
        raise UserError(f"{name} is of {array.dtype}: give uint8, uint16 or floats in 0..1.{hint}")
    return np.ascontiguousarray(to_levels(array, value_range, name))


def _levels(array: np.ndarray, name: str) -> np.ndarray:
    """Convert levels to uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return np.round(array * (255 / WHITE)).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise UserError(
            f"{name} is an array of {array.dtype}: give uint8 in 0..255 (array.astype('uint8')), uint16 or floats in "
            "0..1."
        )
    check_levels(float(array.min()), float(array.max()), name)
    return np.round(array.clip(0, 1) * 255).astype(np.uint8)


def check_levels(least: float, most: float, name: str) -> None:
    """Refuse an image of floats that are not levels in 0..1, up to half a level of 8 bits.

    Args:
        least: smallest level.
        most: largest level.
        name: begins the message.

    Raises:
        UserError: they are in 0..255, normalised or NaN.
    """
    if not (-_SLACK <= least and most <= 1 + _SLACK):  # false for NaN
        raise UserError(
            f"{name} holds floats from {least:.3g} to {most:.3g}: give levels in 0..1, or uint8 in 0..255. Do not "
            "normalise them: the model does so."
        )


def _ones(source: Any, pixels: PixelFormat) -> Iterable[Any]:
    if is_one(source):
        return [source]
    if is_many_files(source):
        return _files(source, pixels)
    if isinstance(source, Iterable) or _is_array(source):
        return source
    raise UserError(f"{type(source).__name__} is not an image. {_ACCEPTED}")


def _files(source: str | PathLike[str], pixels: PixelFormat) -> list[Path]:
    """Return the images in a folder or matched by a pattern; raise an error if there are none."""
    files = find_files(source, pixels.suffixes)
    if not files:
        where = f"The folder {source} holds no image directly" if _is_folder(source) else f"{source} matches no image"
        raise UserError(f"{where}. Image files end in {' '.join(pixels.suffixes)}.")
    return files


def _picture(one: Any, name: str, pixels: PixelFormat) -> Picture:
    if isinstance(one, str | PathLike):
        path = Path(fspath(one)).expanduser()
        if path.is_dir():
            raise UserError(f"{path} is a folder: give its images, or only the folder.")
        return path, pixels.read(path)
    if not pixels.is_rgb and (_is_array(one) or isinstance(one, Image.Image)):
        is_tensor = not isinstance(one, np.ndarray | Image.Image)
        array = _from_tensor(one) if is_tensor else np.asarray(one)
        return None, _as_channels(array, name, pixels, channels_first=is_tensor)
    if isinstance(one, Image.Image):
        return None, as_rgb(one, name)
    if isinstance(one, np.ndarray):
        return None, as_pixels(one, name)
    if _is_array(one):
        return None, as_pixels(_from_tensor(one), name, channels_first=True)
    raise UserError(f"{name} is of type {type(one).__name__}, not an image. {_ACCEPTED}")


def _is_array(source: Any) -> bool:
    """Return whether a source is a numpy array or torch tensor, without importing torch."""
    return isinstance(source, np.ndarray) or all(hasattr(source, name) for name in ("detach", "cpu", "shape"))


def _from_tensor(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return np.asarray(tensor.float() if tensor.is_floating_point() else tensor)  # numpy has no bfloat16


def _is_folder(source: str | PathLike[str]) -> bool:
    return Path(source).expanduser().is_dir()
