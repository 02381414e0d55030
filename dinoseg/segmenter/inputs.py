"""Conversion of any image source (path, array, tensor, Pillow image) to an array (H, W, C); imports no torch."""

import logging
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from dinoseg.core.channels import PixelFormat
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import expand_path, find_files, is_pattern
from dinoseg.utils.images import as_rgb
from dinoseg.utils.levels import WHITE, to_levels

logger = logging.getLogger(__name__)
OnError = Literal["stop", "skip"]
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
    on_error: OnError = "stop",
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
    return _read(_ones(source, pixels), on_error, pixels)


def _read(ones: Iterable[Any], on_error: OnError, pixels: PixelFormat) -> Iterator[Picture]:
    for number, one in enumerate(ones):
        try:
            picture = _picture(one, f"image {number}", pixels)
        except UserError as error:
            if on_error == "stop":
                raise
            logger.warning("left out: %s", error)
            continue
        yield picture


def _as_levels(array: np.ndarray, name: str, pixels: PixelFormat, *, channels_first: bool = False) -> np.ndarray:
    """Convert an array to (H, W, C), uint8 or uint16; for RGB, also grey (H, W) and RGBA, to uint8 without alpha.

    An array (H, W, C) has the values of a file; without a range, floats are 0..1. A tensor (C, H, W) has levels, as the
    items of a dataset.
    """
    if array.ndim == 2:
        array = array[..., None]
    elif channels_first and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    channels = (1, 3, 4) if pixels.is_rgb else (pixels.channels,)
    if array.ndim != 3 or array.shape[2] not in channels or not array.size:
        axes = f"({pixels.channels}, H, W)" if channels_first else f"(H, W, {pixels.channels})"
        raise UserError(f"{name} is of {list(array.shape)} (H, W, C): give {axes}, the channels of this model.")
    value_range = None if channels_first else pixels.value_range
    if value_range is None and np.issubdtype(array.dtype, np.floating):
        check_levels(float(array.min()), float(array.max()), name)
        white, dtype = (255, np.uint8) if pixels.is_rgb else (WHITE, np.uint16)
        array = np.round(array.clip(0, 1) * white).astype(dtype)
    if array.dtype not in (np.uint8, np.uint16) and (value_range is None or array.dtype.kind not in "uif"):
        raise UserError(f"{name} is of {array.dtype}: give uint8 in 0..255, uint16, or floats in 0..1.")
    if not pixels.is_rgb:
        return np.ascontiguousarray(to_levels(array, value_range, name))
    if array.dtype == np.uint16:
        array = np.round(array * (255 / WHITE)).astype(np.uint8)
    return np.ascontiguousarray(array.repeat(3, axis=2) if array.shape[2] == 1 else array[..., :3])


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
    if is_many_files(source):
        return _files(source, pixels)
    is_several = not is_one(source) and (isinstance(source, Iterable) or _is_array(source))
    return source if is_several else [source]


def _files(source: str | PathLike[str], pixels: PixelFormat) -> list[Path]:
    """Return the images in a folder or matched by a pattern; raise an error if there are none."""
    files = find_files(source, pixels.suffixes)
    if not files:
        raise UserError(f"{source} holds or matches no image. Image files end in {' '.join(pixels.suffixes)}.")
    return files


def _picture(one: Any, name: str, pixels: PixelFormat) -> Picture:
    if isinstance(one, str | PathLike):
        path = expand_path(one, ".jpg")
        return path, pixels.read(path)
    if isinstance(one, Image.Image):
        return None, as_rgb(one, name) if pixels.is_rgb else _as_levels(np.asarray(one), name, pixels)
    if isinstance(one, np.ndarray):
        return None, _as_levels(one, name, pixels)
    if _is_array(one):
        return None, _as_levels(_from_tensor(one), name, pixels, channels_first=True)
    raise UserError(f"{name} is of type {type(one).__name__}, not an image. {_ACCEPTED}")


def _is_array(source: Any) -> bool:
    """Return whether a source is a numpy array or torch tensor, without importing torch."""
    return isinstance(source, np.ndarray) or all(hasattr(source, name) for name in ("detach", "cpu", "shape"))


def _from_tensor(tensor: Any) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return np.asarray(tensor.float() if tensor.is_floating_point() else tensor)  # numpy has no bfloat16


def _is_folder(source: str | PathLike[str]) -> bool:
    return Path(source).expanduser().is_dir()
