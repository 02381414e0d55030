"""Reading of image files with any number of channels at full depth, as levels of 8 or 16 bits; imports no torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dinoseg.utils.errors import Unfit, UserError
from dinoseg.utils.files import open_regular
from dinoseg.utils.images import (
    ARRAY_SUFFIX,
    decode,
    explain_errors,
    find_packing,
    load_upright,
    read_orientation,
    read_size,
    scale,
)
from dinoseg.utils.tiff import TiffFile, turn

WHITE = 65535  # highest level of 16 bits
EXACT = 257  # 65535 / 255: 16-bit level of an 8-bit one, at the same share of white
MAX_NUMBERS = 2**29  # numbers of a file that are read: as many as Pillow opens as RGB
# whose arrays are the stored values
_PLAIN_MODES = ("L", "LA", "RGB", "RGBA", "RGBX", "I;16", "I;16L", "I;16B", "I", "F")
_AS = {"1": "L", "P": "RGB"}  # mode to the one that it is converted to; all others to RGB


def read_levels(path: Path, value_range: Sequence[float] | None) -> np.ndarray:
    """Read all channels of an image file as (H, W, C) uint8 or uint16.

    The pages of a TIFF file are channels, and so is the alpha channel of any file. Files of 8 bits stay uint8. Other
    values become uint16: `value_range` is mapped linearly to 0..65535. If pages differ in depth, all become uint16.

    Args:
        path: image of `IMAGE_SUFFIXES`, or an array (H, W) or (H, W, C) in a .npy file.
        value_range: lowest and highest value of files of more than 8 bits; None: 0 and the highest value of the depth
            that the file states, for unsigned integers of up to 16 bits alone.

    Raises:
        UserError: the file is missing, truncated or no image, its range is unknown, or a value is outside of it.
    """
    if path.suffix.lower() == ARRAY_SUFFIX:
        values = _read_array(path)
        values = values.astype(values.dtype.newbyteorder("="), copy=False)
        return to_levels(values[..., None] if values.ndim == 2 else values, value_range, path)
    return decode(
        path,
        lambda image: to_levels(_read_channels(image), value_range, path),
        lambda file: _read_pages(file, value_range, path),
    )


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
    return scale(values, lowest, highest, np.uint16)


def read_levels_size(path: Path) -> tuple[int, int]:
    """Return height and width of a file as `read_levels` returns it, from its header.

    Raises:
        UserError: the file is missing or no image.
    """
    if path.suffix.lower() != ARRAY_SUFFIX:
        return read_size(path)
    height, width, *_ = _read_array(path, header=True).shape
    return height, width


def to_16_bits(levels: np.ndarray) -> np.ndarray:
    """Return uint8 or uint16 levels as uint16, at the same share of white."""
    return levels.astype(np.uint16) * np.uint16(EXACT) if levels.dtype == np.uint8 else levels


def join_levels(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the channels of parts (H, W, C) together, uint16 if one of them is."""
    if len({part.dtype for part in parts}) > 1:
        parts = [to_16_bits(part) for part in parts]
    return np.concatenate(parts, axis=2)


def to_display(image: np.ndarray) -> np.ndarray:
    """Return an image (H, W, C) of uint8 or uint16 as (H, W, 3) uint8 to look at.

    These are the first three channels; of one or two, the first one as grey.
    """
    shown = image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2)
    return np.ascontiguousarray(shown if shown.dtype == np.uint8 else np.round(shown / EXACT).astype(np.uint8))


def find_peaks(levels: np.ndarray) -> tuple[int, ...]:
    """Return the highest level of each channel of uint16 levels (H, W, C), 0 of those of 8 bits; empty for uint8."""
    if levels.dtype == np.uint8:
        return ()
    # `to_16_bits` multiplies levels of 8 bits
    return tuple(int(plane.max()) if (plane % EXACT).any() else 0 for plane in levels.transpose(2, 0, 1))


def _read_channels(image: Image.Image) -> np.ndarray:
    """Return all channels (H, W, C) of an opened image file."""
    if _is_reduced(image):
        return _read_by_opencv(image)
    upright = load_upright(image)
    upright = upright if upright.mode in _PLAIN_MODES else upright.convert(_AS.get(upright.mode, "RGB"))
    return np.asarray(upright).reshape(upright.height, upright.width, len(upright.getbands()))


def _read_pages(file: TiffFile, value_range: Sequence[float] | None, path: Path) -> np.ndarray:
    """Return the channels of all pages as levels (H, W, C), see `read_levels`."""
    sizes = {page.size for page in file.pages}
    if len(sizes) > 1:
        raise Unfit("has pages of different sizes. Save its channels as pages of one size")
    if sum(page.height * page.width * page.samples for page in file.pages) > MAX_NUMBERS:
        raise Unfit(f"has more than {MAX_NUMBERS} numbers. Split it")
    pages = []
    for page in file.pages:
        values = page.read_levels()
        if value_range is None and values.dtype == np.uint16 and page.bits < 16:
            values = scale(values, 0, page.white, np.uint16)
        pages.append(to_levels(values, value_range, path))
    return join_levels(pages)


def _is_reduced(image: Image.Image) -> bool:
    """Return whether Pillow would reduce an image: it reads several channels of 16 bits as 8."""
    return len(image.getbands()) > 1 and ";16" in find_packing(image)


def _read_by_opencv(image: Image.Image) -> np.ndarray:
    import cv2

    orientation = read_orientation(image)
    # OpenCV returns blue, green, red and alpha, also of the grey and alpha of a PNG
    channels = [0, 3] if find_packing(image).startswith("LA") else [2, 1, 0, 3][: len(image.getbands())]
    file = image.fp  # type: ignore[attr-defined]
    file.seek(0)
    # not the further frames of a PNG, which Pillow counts as one page
    _, pages = cv2.imdecodemulti(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED, range=(0, 1))
    if len(pages or ()) != 1 or pages[0].shape[:2] != (image.height, image.width):
        raise Unfit("is truncated, or cannot be decoded at full depth. Replace it, or save it as .npy")
    return turn(pages[0][..., channels], orientation)


def _read_array(path: Path, *, header: bool = False) -> np.ndarray:
    """Return the array of a .npy file, mapped instead of read for its `header` alone; never unpickles anything."""
    with explain_errors(path), open_regular(path) as file:
        values = (
            np.lib.format.open_memmap(path, mode="r") if header else np.lib.format.read_array(file, allow_pickle=False)
        )
        if values.ndim not in (2, 3) or not values.size or values.dtype.kind not in "uif":
            raise Unfit(
                f"holds {values.dtype} values {list(values.shape)}. Save (H, W) or (H, W, C) of uint8, uint16 or floats"
            )
    return values
