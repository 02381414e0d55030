"""Strict reading and writing of image files: a truncated or foreign file is an error that names it."""

import functools
import io
import logging
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import TiffImageFile

from dinoseg.utils.atomic import atomic_file
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import open_regular
from dinoseg.utils.image_cost import MAX_TAGS, Unfit, check_cost, check_header, count_tags

UNREAD_SUFFIXES = (  # of unsupported image formats; such files among images are reported
    *(".gif", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jpx", ".jxl", ".jfif", ".jpe", ".tga", ".psd", ".svg"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".exr", ".hdr", ".dcm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw"),
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
ARRAY_SUFFIX = ".npy"  # an array (H, W, C) of numpy as an image
PIXEL_SUFFIXES = (*IMAGE_SUFFIXES, ARRAY_SUFFIX)
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # Pillow's names of these formats; it could read others
T = TypeVar("T")
log = logging.getLogger(__name__)
_ORIENTATION = 0x0112  # EXIF and TIFF tag; 1 is upright
_SWAPPED = (5, 6, 7, 8)  # values that swap height and width
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF, _RAW_EXIF = "exif", "Raw profile type exif"  # info keys
_EXIF_START = b"Exif\0\0"  # before the tags, once or twice
_MAX_RAW_EXIF = 2**20  # characters of EXIF as hexadecimal text
_METADATA = {_EXIF, _RAW_EXIF, "xmp", "XML:com.adobe.xmp"}  # info keys with a possible orientation
_BITS = 258  # TIFF tag: bits per sample
_PHOTOMETRIC, _SAMPLES, _PLANES = 262, 277, 284  # TIFF tags
_SAMPLE_FORMAT, _SIGNED = 339, 2  # TIFF tag, and its value for signed integers
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # signatures of TIFF files
_RAW_MODES = ("1", "P", "I", "I;16", "I;16L", "I;16B")  # modes in which Pillow returns the stored values
_RAW_MODES_UNMARKED = ("L", "LA", "RGB", "RGBA", "RGBX")  # the same, if packed in whole bytes
_warned: list[str | Path] = []  # the file that the warning about scaling named
# what Pillow raises for damaged files
_DAMAGE = (OSError, SyntaxError, ArithmeticError, LookupError, TypeError, ValueError, struct.error)
_NO_PICTURE = "is truncated or not an image: replace or remove it"
_STRETCHED = {"2": 85, "4": 17}  # bits per pixel of grey files to Pillow's factor on their values


class ImageTooLarge(UserError):
    """Error for an image of more pixels than Pillow's limit."""


def read_image(path: str | Path) -> np.ndarray:
    """Read an image as (H, W, 3) uint8 RGB, upright by the orientation in its header.

    16-bit grey images are scaled from 0..65535 to 0..255, with one warning per process; 12-bit ones from 0..4095.

    Raises:
        UserError: if the file is missing, truncated or no image, or holds other values than levels of 8 or 16 bits.
    """
    return np.asarray(decode(path, functools.partial(_upright_rgb, path)))


def as_rgb(image: Image.Image, name: str) -> np.ndarray:
    """Convert an opened image as `read_image` does: (H, W, 3) uint8 RGB, upright, only the first frame.

    Raises:
        UserError: if it is truncated, or holds other values than levels of 8 or 16 bits; `name` begins the message.
    """
    try:
        return np.asarray(_upright_rgb(name, image))
    except UserError:
        raise
    except Unfit as error:
        raise UserError(f"{name} {error}.") from None
    except _DAMAGE as error:
        raise UserError(f"{name} cannot be read as an image ({error}). Replace or remove it.") from error


def read_ids(path: str | Path) -> np.ndarray:
    """Read the stored values of a mask file: (H, W) for grey and palette files, (H, W, 3) for RGB ones.

    Palette files give their indices, not their colours. Files of 1, 2 or 4 bits per pixel give 0..1, 0..3 or 0..15;
    16-bit files keep their values.

    Raises:
        UserError: if the file is missing, truncated or no image, or Pillow would change its values.
    """
    return decode(path, _stored_numbers)


def read_size(path: str | Path) -> tuple[int, int]:
    """Return height and width of an image as `read_image` returns it, from its header.

    Raises:
        UserError: if the file is missing or no image.
    """
    return decode(path, _upright_size)


def is_turned(path: str | Path) -> bool:
    """Return whether `read_image` rotates or mirrors an image, by the orientation in its header.

    Raises:
        UserError: if the file is missing or no image.
    """
    return decode(path, lambda image: read_orientation(image) != 1)


def varies_in_alpha(path: str | Path) -> bool:
    """Return whether an image has an alpha channel of several values.

    Raises:
        UserError: if the file is missing or no image.
    """
    return decode(path, _has_several_alphas)


def read_orientation(image: Image.Image) -> int:
    """Return the orientation (1 to 8, as in EXIF) in the header of an image that is not loaded yet.

    It is read from EXIF or TIFF tags, else from XMP; damaged or far too many tags mean 1 (upright). PNG metadata behind
    the pixels is not read: a reader of the header does not see it.
    """
    if not isinstance(image, TiffImageFile) and not _METADATA & image.info.keys():
        return 1
    exif = image.info.get(_EXIF, b"")
    if not isinstance(exif, bytes) or len(image.info.get(_RAW_EXIF, "")) > _MAX_RAW_EXIF:
        return 1  # text of a PNG chunk that is named exif, or too much of it
    if count_tags(io.BytesIO(exif.removeprefix(_EXIF_START).removeprefix(_EXIF_START))) > MAX_TAGS:
        return 1
    try:
        # not `PngImageFile.getexif`, which decodes all pixels to read the chunks behind them
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, struct.error):
        return 1
    return value if value in _TRANSPOSES else 1


def has_one_bit(path: str | Path) -> bool:
    """Return whether an image is black and white: one bit per pixel, and no palette.

    Raises:
        UserError: if the file is missing or no image.
    """
    return decode(path, lambda image: image.mode == "1")


def write_png(path: str | Path, pixels: np.ndarray, *, note: tuple[str, str] | None = None) -> None:
    """Write (H, W) or (H, W, 3) uint8 as a lossless PNG; the file appears whole or not at all.

    `note`: a keyword and its text (PNG's tEXt), stored before the pixels.
    """
    info = PngInfo()
    if note is not None:
        info.add_text(*note)
    with atomic_file(Path(path)) as part:
        Image.fromarray(pixels).save(part, format="PNG", compress_level=1, pnginfo=info)


def load_upright(image: Image.Image) -> Image.Image:
    """Return an opened image decoded and upright; its mode does not change."""
    check_cost(image)
    check_storage(image)
    # before loading; Pillow itself rotates a TIFF while it loads one
    orientation = 1 if isinstance(image, TiffImageFile) else read_orientation(image)
    image.load()
    return image.copy() if orientation == 1 else image.transpose(_TRANSPOSES[orientation])


def check_storage(image: Image.Image) -> None:
    """Refuse an opened TIFF file whose values Pillow and OpenCV would return changed.

    Raises:
        Unfit: if it is of such a kind.
    """
    if not isinstance(image, TiffImageFile) or not image.tile:
        return
    tags = image.tag_v2
    is_deep = max(tags.get(_BITS, (1,))) > 8
    planes = tags.get(_SAMPLES, 1) if tags.get(_PLANES) == 2 else 1
    changed = {
        "signed numbers of 8 bits": not is_deep and _SIGNED in tags.get(_SAMPLE_FORMAT, ()),
        "each channel in a plane of its own": planes > 1
        and (is_deep or (planes > 3 and image.tile[0].codec_name == "libtiff")),
        "0 as white in more than 8 bits": is_deep and tags.get(_PHOTOMETRIC) == 0,
    }
    if kind := next((name for name, is_stored in changed.items() if is_stored), None):
        raise Unfit(f"stores {kind}, which is not supported. Save unsigned numbers, 0 as black, all channels together")


def _upright_rgb(path: str | Path, image: Image.Image) -> Image.Image:
    upright = load_upright(image)
    if image.mode == "F":
        raise Unfit("holds floating-point values of unknown range. Convert it to 8 bits")
    if image.mode.startswith("I"):
        upright = _eight_bits(path, upright, bits=12 if _bits(image) == (12,) else 16)
    upright.info.pop("transparency", None)  # dropped: Pillow would warn about a palette's transparency
    return upright.convert("RGB")


def _eight_bits(path: str | Path, image: Image.Image, bits: int) -> Image.Image:
    levels, white = np.asarray(image).astype(np.int64), 2**bits - 1
    if levels.min() < 0 or levels.max() > white:
        raise Unfit(f"holds values from {levels.min()} to {levels.max()}, not {bits}-bit levels. Convert it to 8 bits")
    if bits == 16:  # 12-bit files mostly use their full range
        _warn_of_scaling(path)
    return Image.fromarray(np.round(levels * (255 / white)).astype(np.uint8))


def _bits(image: Image.Image) -> tuple[int, ...]:
    """Return the bits of each sample of a TIFF file."""
    return image.tag_v2.get(_BITS, ()) if isinstance(image, TiffImageFile) else ()


def _warn_of_scaling(path: str | Path) -> None:
    if not _warned:
        _warned.append(path)
        log.warning(
            "16-bit grey images, such as %s, are scaled from 0..65535 to 0..255. If yours use a smaller range, such as "
            "0..4095, they become dark: convert them to 8 bits first.",
            path,
        )


def _stored_numbers(image: Image.Image) -> np.ndarray:
    mark = _check_packing(image)  # before loading, which discards it
    check_cost(image)
    image.load()
    if image.mode == "1":
        return np.asarray(image, np.uint8)
    if image.mode == "L" and mark in _STRETCHED:
        return np.asarray(image) // _STRETCHED[mark]
    if image.mode in ("I;16", "I;16L", "I;16B"):
        return np.asarray(image).astype(np.uint16, copy=False)  # in this machine's byte order
    if image.mode in ("L", "P", "I", "RGB"):
        return np.asarray(image)
    return np.asarray(image.convert("L" if image.mode == "LA" else "RGB"))


def _has_several_alphas(image: Image.Image) -> bool:
    if image.mode not in ("LA", "RGBA"):  # from the header: other files are not decoded
        return False
    check_cost(image)
    low, high = image.getchannel("A").getextrema()
    return low != high


def find_packing(image: Image.Image) -> str:
    """Return Pillow's name of how the pixels of an opened image are packed, such as `RGB;16L`; empty once decoded."""
    packing = image.tile[0].args if isinstance(image, ImageFile) and image.tile else ""
    return str(next(iter(packing), "") if isinstance(packing, tuple) else packing)


def _check_packing(image: Image.Image) -> str:
    """Return Pillow's mark of how pixels are packed: `4` for four bits, empty for whole bytes.

    Raises:
        Unfit: if Pillow would clip, scale or invert ids.
    """
    name = find_packing(image)
    mark = name.partition(";")[2]
    unchanged = image.mode in _RAW_MODES or (image.mode in _RAW_MODES_UNMARKED and mark in ("", "R", "L"))
    unchanged = unchanged or (image.mode == "L" and mark in _STRETCHED)
    signed = image.mode == "L" and isinstance(image, TiffImageFile) and _SIGNED in image.tag_v2.get(_SAMPLE_FORMAT, ())
    if signed or not unchanged:
        kind = "signed 8-bit numbers" if signed else f"{name if mark else image.mode}, by Pillow's name"
        raise Unfit(f"has a format that does not preserve ids ({kind}). Save it as a grey PNG of 8 or 16 bits")
    return mark


def _upright_size(image: Image.Image) -> tuple[int, int]:
    swapped = read_orientation(image) in _SWAPPED
    if isinstance(image, TiffImageFile) and _ORIENTATION in image.tag_v2:
        swapped = False  # Pillow has already swapped the size by this tag, but would not by XMP
    return (image.width, image.height) if swapped else (image.height, image.width)


@contextmanager
def open_bounded(path: str | Path) -> Iterator[BinaryIO]:
    """Open an image file as bytes, unless its header alone would cost far more to read than it warrants.

    Raises:
        UserError: if its header has too many parts, or it is no regular file.
        OSError: if the file is missing or cannot be read.
    """
    with open_regular(path) as file:
        try:
            check_header(file)
        except Unfit as error:
            raise UserError(f"{path} {error}.") from None
        yield file


@contextmanager
def open_image(path: str | Path) -> Iterator[ImageFile]:
    """Open an image file without decoding it.

    Raises:
        UserError, OSError: as `open_bounded`, or if it is no image of these formats (Pillow's names).
    """
    with open_bounded(path) as file, Image.open(file, formats=FORMATS) as image:
        yield image


def decode(path: str | Path, take: Callable[[Image.Image], T]) -> T:
    """Return `take` of an opened image file.

    Raises:
        UserError: if the file is missing, truncated or no image, or `take` raises one of Pillow's errors or `Unfit`.
    """
    try:
        with open_image(path) as image:
            return take(image)
    except UserError:
        raise
    except (*_DAMAGE, MemoryError, Image.DecompressionBombError, Unfit) as error:
        raise _explain(Path(path), error) from error


def _explain(path: Path, error: Exception) -> UserError:
    """Return the message for an error in reading an image."""
    unreadable = f"Cannot read {path} as an image"
    if isinstance(error, FileNotFoundError):
        return UserError(f"File not found: {path}. Check the path.")
    if isinstance(error, PermissionError):
        return UserError(f"Cannot read {path}: permission denied. Give your user read permission.")
    if isinstance(error, MemoryError):
        return UserError(f"Not enough memory to read {path} as an image. Free some, or reduce or split the image.")
    if isinstance(error, Image.DecompressionBombError):
        return ImageTooLarge(
            f"{unreadable}: it is too large ({error}). Reduce or split it; mode=predict reads it with libvips: "
            "pip install 'dinoseg[large]'."
        )
    if isinstance(error, Unfit):
        return UserError(f"{path} {error}.")
    if isinstance(error, UnidentifiedImageError):
        with path.open("rb") as file:
            is_tiff = file.read(4) in _TIFF
        kind = "is truncated, or has an unsupported format, such as floating point: replace it, or convert it to 8 bits"
        return UserError(f"{unreadable}. It {kind if is_tiff else _NO_PICTURE}.")
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"Cannot read {path} ({error.strerror}). Check the path and its disk.")
    return UserError(f"{unreadable} ({error}). It {_NO_PICTURE}.")
