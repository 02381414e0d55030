"""Reading of image files with any number of channels at full depth, as levels of 8 or 16 bits; imports no torch."""

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from dinoseg.utils.errors import UserError
from dinoseg.utils.files import open_regular
from dinoseg.utils.image_cost import Unfit, check_cost, check_pages
from dinoseg.utils.images import (
    ARRAY_SUFFIX,
    check_storage,
    decode,
    find_packing,
    load_upright,
    read_orientation,
    read_size,
)

WHITE = 65535  # highest level of 16 bits
EXACT = 257  # 65535 / 255: 16-bit level of an 8-bit one, at the same share of white
_MAX_NUMBERS = 2**29  # numbers of a file that are read: as many as Pillow opens as RGB
_MAX_HEADER = 2**14  # bytes of a .npy file's header: more than numpy parses
_BAND = 2**22  # numbers that are converted at once: 100 MiB in float64
_SAMPLES_PER_PIXEL = 277  # TIFF tag
# whose arrays are the stored values
_PLAIN_MODES = ("L", "LA", "RGB", "RGBA", "RGBX", "I;16", "I;16L", "I;16B", "I", "F")
_AS = {"1": "L", "P": "RGB"}  # mode to the one that it is converted to; all others to RGB


def read_levels(path: Path, value_range: Sequence[float] | None) -> np.ndarray:
    """Read all channels of an image file as (H, W, C) uint8 or uint16.

    The pages of a TIFF file are channels, and so is the alpha channel of any file. Files of 8 bits stay uint8. Other
    values become uint16: `value_range` is mapped linearly to 0..65535.

    Args:
        path: image of `IMAGE_SUFFIXES`, or an array (H, W) or (H, W, C) in a .npy file.
        value_range: lowest and highest value of files of more than 8 bits; None: 0 and 65535, for uint16 alone.

    Raises:
        UserError: the file is missing, truncated or no image, its range is unknown, or a value is outside of it.
    """
    values = _read_array(path) if path.suffix.lower() == ARRAY_SUFFIX else decode(path, _read_channels)
    return to_levels(values[..., None] if values.ndim == 2 else values, value_range, path)


def to_levels(values: np.ndarray, value_range: Sequence[float] | None, name: object) -> np.ndarray:
    """Convert the values of an image to levels, uint8 or uint16, see `read_levels`; `name` begins an error message.

    Raises:
        UserError: the range of the values is unknown, or a value is outside of it.
    """
    if values.dtype == np.uint8 or (values.dtype == np.uint16 and value_range is None):
        return values
    if value_range is None:
        raise UserError(
            f"{name} holds {values.dtype} values of unknown range. Declare it: "
            "data/pixels=files data.pixels.value_range=[LOWEST,HIGHEST]."
        )
    lowest, highest = value_range
    least, most = float(values.min()), float(values.max())
    if not (lowest <= least and most <= highest):  # false for NaN
        raise UserError(
            f"{name} holds values from {least:g} to {most:g}, outside data.pixels.value_range={[lowest, highest]}. "
            "Declare a range of all values, or correct them."
        )
    levels = np.empty(values.shape, np.uint16)
    rows = max(1, _BAND // values[0].size)
    for start in range(0, len(values), rows):
        band = values[start : start + rows].astype(np.float64)
        levels[start : start + rows] = np.round((band - lowest) / (highest - lowest) * WHITE)
    return levels


def read_levels_size(path: Path) -> tuple[int, int]:
    """Return height and width of a file as `read_levels` returns it, from its header.

    Raises:
        UserError: the file is missing or no image.
    """
    if path.suffix.lower() != ARRAY_SUFFIX:
        return read_size(path)
    with _open_array(path) as file:
        shape, _, _ = _read_header(file, path)
    return shape[0], shape[1]


def to_16_bits(levels: np.ndarray) -> np.ndarray:
    """Return uint8 or uint16 levels as uint16, at the same share of white."""
    return levels.astype(np.uint16) * np.uint16(EXACT) if levels.dtype == np.uint8 else levels


def to_display(image: np.ndarray) -> np.ndarray:
    """Return an image (H, W, C) of uint8 or uint16 as (H, W, 3) uint8 to look at.

    These are the first three channels; of one or two, the first one as grey.
    """
    shown = image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2)
    return np.ascontiguousarray(shown if shown.dtype == np.uint8 else np.round(shown / EXACT).astype(np.uint8))


def _read_channels(image: Image.Image) -> np.ndarray:
    """Return all channels (H, W, C) of an opened image file, those of a TIFF file page by page."""
    if isinstance(image, TiffImageFile):
        check_pages(image)
    if _is_reduced(image):
        return _read_by_opencv(image)
    planes: list[np.ndarray] = []
    for page in _pages(image):
        planes.append(_plane(page))
        if planes[-1].shape[:2] != planes[0].shape[:2]:
            raise Unfit("has pages of different sizes. Save its channels as pages of one size")
        _check_numbers(sum(plane.size for plane in planes))
    return np.concatenate(planes, axis=2)  # in this machine's byte order


def _pages(image: Image.Image) -> Iterator[Image.Image]:
    for number in itertools.count() if isinstance(image, TiffImageFile) else (0,):
        try:
            image.seek(number)
        except EOFError:
            return
        yield image


def _plane(image: Image.Image) -> np.ndarray:
    upright = load_upright(image)
    upright = upright if upright.mode in _PLAIN_MODES else upright.convert(_AS.get(upright.mode, "RGB"))
    bands = len(upright.getbands())
    stored = _count_samples(image)
    if isinstance(image, TiffImageFile) and image.mode != "P" and stored != bands:
        raise Unfit(f"stores {stored} channels, and {bands} can be read. Save each channel as a page, or all as .npy")
    return np.asarray(upright).reshape(upright.height, upright.width, bands)


def _count_samples(image: Image.Image) -> int:
    """Return the number of channels that a page stores."""
    bands = len(image.getbands())
    return image.tag_v2.get(_SAMPLES_PER_PIXEL, 1) if isinstance(image, TiffImageFile) else bands


def _is_reduced(image: Image.Image) -> bool:
    """Return whether Pillow would reduce or change an image.

    It reduces several channels of 16 bits to 8, and RGB with another channel to RGB. It divides colours by an
    associated alpha channel (RGBa).
    """
    packing = find_packing(image)
    is_changed = isinstance(image, TiffImageFile) and packing.startswith(("RGBX", "RGBa"))
    return len(image.getbands()) > 1 and (";16" in packing or is_changed)


def _read_by_opencv(image: Image.Image) -> np.ndarray:
    import cv2

    height, width = image.height, image.width
    orientation = 1 if isinstance(image, TiffImageFile) else read_orientation(image)  # OpenCV turns TIFF files
    file = image.fp  # type: ignore[attr-defined]
    packing = find_packing(image)
    # OpenCV returns blue, green, red and alpha, also of the grey and alpha of a PNG
    channels = [0, 3] if packing.startswith("LA") else [2, 1, 0, 3][: _count_samples(image)]
    samples = len(channels)
    count = 0
    for page in _pages(image):  # check all, since OpenCV decodes all at once
        check_cost(page)
        check_storage(page)
        count += 1
        if (page.height, page.width, find_packing(page)) != (height, width, packing):
            raise Unfit("has pages of different sizes or kinds. Save its channels as pages of one size")
        _check_numbers(count * height * width * samples)
    file.seek(0)
    # not the further frames of a PNG, which Pillow counts as one page
    _, pages = cv2.imdecodemulti(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED, range=(0, count))
    if len(pages or ()) != count or any(page.shape[:2] != (height, width) for page in pages):
        raise Unfit("cannot be decoded at full depth. Save its channels as pages, or as .npy")
    levels = np.empty((height, width, count * samples), pages[0].dtype)
    for number, stored in enumerate(pages):
        levels[..., samples * number : samples * (number + 1)] = stored[..., channels]
    return _turn(levels, orientation)


def _turn(levels: np.ndarray, orientation: int) -> np.ndarray:
    """Return levels (H, W, C) upright; `orientation` as in EXIF."""
    if orientation >= 5:
        levels = levels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        levels = levels[::-1]
    if orientation in (2, 3, 6, 7):
        levels = levels[:, ::-1]
    return np.ascontiguousarray(levels)


def _check_numbers(count: int) -> None:
    if count > _MAX_NUMBERS:
        raise Unfit(f"has more than {_MAX_NUMBERS} numbers. Split it")


def _open_array(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except FileNotFoundError:
        raise UserError(f"File not found: {path}. Check the path.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}). Check the path and its disk.") from error


def _read_array(path: Path) -> np.ndarray:
    with _open_array(path) as file:
        shape, is_fortran, dtype = _read_header(file, path)
        length = math.prod(shape) * dtype.itemsize
        data = file.read(length)
    if len(data) < length:
        raise UserError(f"{path} is truncated: it has {len(data)} of {length} bytes. Replace it.")
    values = np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")
    return values.astype(dtype.newbyteorder("="))  # a copy that can be written


def _read_header(file: BinaryIO, path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, memory order and type of a .npy file; never unpickles anything."""
    head = io.BytesIO(file.read(_MAX_HEADER))  # numpy reads a header of any length before it refuses it
    try:
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(head)
    except Exception:  # numpy parses it as a Python literal, which fails in many ways
        raise UserError(f"{path} cannot be read as an array. Save it again by numpy.save.") from None
    is_shape = len(shape) in (2, 3) and all(type(side) is int and side > 0 for side in shape)
    if not is_shape or math.prod(shape) > _MAX_NUMBERS:
        raise UserError(
            f"{path} holds an array of {list(shape)}. Save (H, W) or (H, W, C), with 1 to {_MAX_NUMBERS} numbers."
        )
    if dtype.kind not in "uif":
        raise UserError(f"{path} holds {dtype} values. Save uint8, uint16 or floats.")
    file.seek(head.tell())
    return shape, is_fortran, dtype
