"""Strict reading and writing of image files: a truncated or foreign file is an error that names it."""

import io
import logging
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import TiffImageFile

from dinoseg.utils.atomic import atomic_file
from dinoseg.utils.errors import Unfit, UserError
from dinoseg.utils.files import open_regular
from dinoseg.utils.tiff import BLACK_IS_ZERO, PALETTE, RGB, WHITE_IS_ZERO, TiffFile, TiffPage, is_tiff
from dinoseg.utils.truncation import check_jpeg

UNREAD_SUFFIXES = (  # of unsupported image formats; such files among images are reported
    *(".gif", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jpx", ".jxl", ".jfif", ".jpe", ".tga", ".psd", ".svg"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".exr", ".hdr", ".dcm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw"),
)
TIFF_SUFFIXES = (".tif", ".tiff")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", *TIFF_SUFFIXES, ".webp")
ARRAY_SUFFIX = ".npy"  # an array (H, W, C) of numpy as an image
PIXEL_SUFFIXES = (*IMAGE_SUFFIXES, ARRAY_SUFFIX)
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")  # Pillow's names of the formats that it reads here; it could read others
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
_BAND = 2**22  # numbers that are converted at once: 100 MiB in float64
_METADATA = {_EXIF, _RAW_EXIF, "xmp", "XML:com.adobe.xmp"}  # info keys with a possible orientation
_RAW_MODES = ("1", "P", "I", "I;16", "I;16L", "I;16B")  # modes in which Pillow returns the stored values
_RAW_MODES_UNMARKED = ("L", "LA", "RGB", "RGBA", "RGBX")  # the same, if packed in whole bytes
_LOSSY = ("JPEG", "MPO", "WEBP")  # Pillow's names; lossless WebP is rare
_warned: list[str | Path] = []  # the file that the warning about scaling named
# what Pillow, tifffile and NumPy raise for damaged files
_DAMAGE = (
    *(OSError, SyntaxError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError, struct.error),
    *(MemoryError, Image.DecompressionBombError),
)
_NO_PICTURE = "is truncated or not an image: replace or remove it"
_FULL_DEPTH = "data/pixels=files data.pixels.value_range=[LOWEST,HIGHEST]"
_STRETCHED = {"2": 85, "4": 17}  # bits per pixel of grey files to Pillow's factor on their values


def read_image(path: str | Path) -> np.ndarray:
    """Read an image as (H, W, 3) uint8 RGB, upright by the orientation in its header.

    Images of 16 bits are scaled from 0..65535 to 0..255, with one warning per process; TIFF files of 12 bits per value
    from 0..4095.

    Raises:
        UserError: if the file is missing, truncated or no image, has several pages, or holds other values than levels
            of 8 or 16 bits.
    """

    def read_page(file: TiffFile) -> np.ndarray:
        channels = sum(page.samples for page in file.pages)
        key = "data/pixels=files data.pixels.order=[0,1,2]" if channels == 3 else f"data.channels={channels}"
        return _rgb_of_page(path, file.get_only_page(f"If its pages are channels, set {key}"))

    return decode(path, lambda image: np.asarray(_upright_rgb(path, image)), read_page)


def as_rgb(image: Image.Image, name: str) -> np.ndarray:
    """Convert an opened image as `read_image` does: (H, W, 3) uint8 RGB, upright, only the current frame.

    Raises:
        UserError: if it is truncated, or holds other values than levels of 8 or 16 bits; `name` begins the message.
    """
    with explain_errors(name):
        # not loaded yet: Pillow would change or refuse some
        if isinstance(image, TiffImageFile) and image.tile and image.fp is not None:
            return _rgb_of_page(name, TiffFile(image.fp).stored_pages[image.tell()])
        return np.asarray(_upright_rgb(name, image))


def read_ids(path: str | Path) -> np.ndarray:
    """Read the stored values of a mask file: (H, W) for grey and palette files, (H, W, 3) for RGB ones.

    Palette files give their indices, not their colours. Files of 1, 2 or 4 bits per pixel give 0..1, 0..3 or 0..15;
    others keep their values.

    Raises:
        UserError: if the file is missing, truncated or no image, has several pages or frames, or holds no integers.
    """
    remedy = "If each page is the mask of a class, set task=multilabel"
    return decode(path, _stored_numbers, lambda file: _ids_of_page(file.get_only_page(remedy)))


def read_ids_of_page(path: str | Path, page: int, count: int) -> np.ndarray:
    """Read the stored values of one page of a TIFF mask, see `read_ids`.

    Args:
        path: the file.
        page: index of the page.
        count: number of pages that the file must have.

    Raises:
        UserError: see `read_ids`, or it has another number of pages.
    """

    def refuse(image: Image.Image) -> np.ndarray:
        raise Unfit(f"has one page, and one for each of {count} classes is needed. Save it as TIFF of several pages")

    def read_page(file: TiffFile) -> np.ndarray:
        if len(file.pages) != count:
            raise Unfit(f"has {len(file.pages)} pages, and one for each of {count} classes is needed. Save it again")
        return _ids_of_page(file.pages[page])

    return decode(path, refuse, read_page)


def read_valid(path: str | Path) -> np.ndarray | None:
    """Return which pixels (H, W) the internal masks of a TIFF file mark as valid; None without such masks.

    Raises:
        UserError: if the file is missing, truncated or no image.
    """
    return decode(path, lambda image: None, TiffFile.read_valid)


def read_size(path: str | Path) -> tuple[int, int]:
    """Return height and width of an image as `read_image` returns it, from its header.

    Raises:
        UserError: if the file is missing or no image.
    """
    return decode(path, _upright_size, lambda file: file.pages[0].size)


def is_turned(path: str | Path) -> bool:
    """Return whether `read_image` rotates or mirrors an image, by the orientation in its header.

    Raises:
        UserError: if the file is missing or no image.
    """
    return decode(path, lambda image: read_orientation(image) != 1, lambda file: file.pages[0].orientation != 1)


def varies_in_alpha(path: str | Path) -> bool:
    """Return whether an image has an alpha channel of several values.

    Raises:
        UserError: if the file is missing or no image.
    """
    return decode(path, _has_several_alphas, _page_has_several_alphas)


def read_orientation(image: Image.Image) -> int:
    """Return the orientation (1 to 8, as in EXIF) in the header of an image that is not loaded yet.

    It is read from EXIF or TIFF tags, else from XMP; damaged tags mean 1 (upright). PNG metadata behind the pixels is
    not read: a reader of the header does not see it.
    """
    if not _METADATA & image.info.keys():
        return 1
    exif = image.info.get(_EXIF, b"")
    if not isinstance(exif, bytes):
        return 1  # text of a PNG chunk that is named exif
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
    return decode(path, lambda image: image.mode == "1", lambda file: file.pages[0].bits == 1)


def is_deep(path: str | Path) -> bool:
    """Return whether an image stores levels of 9 to 16 bits, by its header.

    Raises:
        UserError: if the file is missing or no image.
    """
    return decode(
        path,
        lambda image: ";16" in image.mode or ";16" in find_packing(image),
        lambda file: file.pages[0].is_unsigned and 8 < file.pages[0].bits <= 16,
    )


def lossy_format(path: str | Path) -> str | None:
    """Return the name of an image's format if it changes values: JPEG, WebP, or TIFF with JPEG; else None.

    Raises:
        UserError: if the file is missing or no image.
    """
    return decode(
        path,
        lambda image: image.format if image.format in _LOSSY else None,
        lambda file: "TIFF" if file.pages[0].is_lossy else None,
    )


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
    orientation = read_orientation(image)  # before loading
    load_whole(image)
    return image.copy() if orientation == 1 else image.transpose(_TRANSPOSES[orientation])


def load_whole(image: Image.Image) -> None:
    """Decode an opened image; refuse it if its file lacks some of its pixels.

    Raises:
        Unfit: if it does.
    """
    data = b""
    if isinstance(image, JpegImageFile) and image.tile and image.fp is not None:
        position = image.fp.tell()
        image.fp.seek(0)
        data = image.fp.read()  # before loading, which may close the file
        image.fp.seek(position)
    image.load()
    if data:
        check_jpeg(data, np.asarray(image), lambda changed: np.asarray(Image.open(io.BytesIO(changed))))


def _upright_rgb(path: str | Path, image: Image.Image) -> Image.Image:
    is_reduced = ";16" in find_packing(image)  # of several channels, by Pillow
    upright = load_upright(image)
    if image.mode == "F" or image.mode.startswith("I"):
        upright = Image.fromarray(_eight_bits(path, np.asarray(upright), white=65535))
    elif is_reduced:
        _warn_of_scaling(path)
    upright.info.pop("transparency", None)  # dropped: Pillow would warn about a palette's transparency
    return upright.convert("RGB")


def _rgb_of_page(path: str | Path, page: TiffPage) -> np.ndarray:
    """Return a page of a TIFF file as (H, W, 3) uint8 RGB."""
    levels = page.read_levels()
    colors = levels.shape[2] - (page.has_alpha and page.photometric in (BLACK_IS_ZERO, WHITE_IS_ZERO))
    if colors not in (1, 3) and page.photometric != RGB:
        raise Unfit(
            f"has {levels.shape[2]} channels, and 1 or 3 are read as RGB. Set data.channels={levels.shape[2]}; or "
            "choose channels by data/pixels=files data.pixels.order=[0,1,2]"
        )
    levels = levels[..., :1].repeat(3, axis=2) if colors == 1 else levels[..., :3]
    return np.ascontiguousarray(_eight_bits(path, levels, white=page.white if page.bits < 16 else 65535))


def _eight_bits(path: str | Path, levels: np.ndarray, white: int) -> np.ndarray:
    """Scale levels of 0..white to uint8."""
    if levels.dtype == np.uint8:
        return levels
    if levels.dtype.kind == "f":
        raise Unfit(f"holds floating-point values of unknown range. Declare it: {_FULL_DEPTH}; or convert it to 8 bits")
    if levels.min() < 0 or levels.max() > white:
        raise Unfit(
            f"holds values from {levels.min()} to {levels.max()}, not levels from 0 to {white}. Declare their range: "
            f"{_FULL_DEPTH}; or convert it to 8 bits"
        )
    if white == 65535:  # files of fewer bits mostly use their full range
        _warn_of_scaling(path)
    return scale(levels, 0, white, np.uint8)


def scale(values: np.ndarray, lowest: float, highest: float, dtype: type) -> np.ndarray:
    """Map values linearly from lowest..highest to the range of an unsigned type, in bands of rows."""
    scaled: np.ndarray = np.empty(values.shape, dtype)
    rows = max(1, _BAND // values[0].size)
    for start in range(0, len(values), rows):
        band = values[start : start + rows].astype(np.float64)
        scaled[start : start + rows] = np.round((band - lowest) / (highest - lowest) * np.iinfo(dtype).max)
    return scaled


def _warn_of_scaling(path: str | Path) -> None:
    if not _warned:
        _warned.append(path)
        log.warning(
            "16-bit images, such as %s, are scaled from 0..65535 to 0..255. If yours use a smaller range, such as "
            "0..4095, they become dark: declare it by data/pixels=files data.pixels.value_range=[0,4095].",
            path,
        )


def _stored_numbers(image: Image.Image) -> np.ndarray:
    frames = getattr(image, "n_frames", 1)
    if image.format in ("PNG", "WEBP") and frames > 1:
        raise Unfit(f"has {frames} frames, and a mask has one. Save the one that is meant")
    mark = _check_packing(image)  # before loading, which discards it
    load_whole(image)
    if image.mode == "1":
        return np.asarray(image, np.uint8)
    if image.mode == "L" and mark in _STRETCHED:
        return np.asarray(image) // _STRETCHED[mark]
    if image.mode in ("I;16", "I;16L", "I;16B"):
        return np.asarray(image).astype(np.uint16, copy=False)  # in this machine's byte order
    if image.mode in ("L", "P", "I", "RGB"):
        return np.asarray(image)
    return np.asarray(image.convert("L" if image.mode == "LA" else "RGB"))


def _ids_of_page(page: TiffPage) -> np.ndarray:
    """Return the stored integers of a page of a TIFF file: (H, W), or (H, W, 3) of RGB."""
    colors = 3 if page.photometric == RGB else 1
    kinds = {
        "floating-point numbers": page.is_float,
        "0 as white": page.photometric == WHITE_IS_ZERO and page.bits > 1,
        "colours of more than 8 bits": colors == 3 and page.bits != 8,
        f"{page.samples} channels": page.samples - page.has_alpha != colors,
        "colours that are not RGB": page.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE),
    }
    if kind := next((name for name, is_stored in kinds.items() if is_stored), None):
        raise Unfit(f"has a format that does not preserve ids ({kind}). Save it as a grey PNG of 8 or 16 bits")
    values = page.read()
    if page.bits == 1:
        values = values.astype(np.uint8) if page.photometric != WHITE_IS_ZERO else 1 - values.astype(np.uint8)
    return np.ascontiguousarray(values[..., :3] if colors == 3 else values[..., 0])


def _page_has_several_alphas(file: TiffFile) -> bool:
    page = file.pages[0]
    return page.has_alpha and bool(np.ptp(page.read()[..., -1]) > 0)


def _has_several_alphas(image: Image.Image) -> bool:
    if image.mode not in ("LA", "RGBA"):  # from the header: other files are not decoded
        return False
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
    if not unchanged:
        kind = f"{name if mark else image.mode}, by Pillow's name"
        raise Unfit(f"has a format that does not preserve ids ({kind}). Save it as a grey PNG of 8 or 16 bits")
    return mark


def _upright_size(image: Image.Image) -> tuple[int, int]:
    swapped = read_orientation(image) in _SWAPPED
    return (image.width, image.height) if swapped else (image.height, image.width)


def decode(path: str | Path, take: Callable[[Image.Image], T], take_tiff: Callable[[TiffFile], T]) -> T:
    """Return `take` of an opened image file that is not decoded yet, or `take_tiff` of a TIFF file.

    Raises:
        UserError: if the file is missing, truncated or no image of these formats, or one of the two raises an error of
            a reader or `Unfit`.
    """
    with explain_errors(path), open_regular(path) as file:
        if is_tiff(file):
            opened = TiffFile(file)
            _check_size(opened.pages[0])
            return take_tiff(opened)
        with Image.open(file, formats=FORMATS) as image:
            return take(image)


@contextmanager
def explain_errors(name: str | Path) -> Iterator[None]:
    """Turn errors in reading an image into messages that begin with its name.

    Raises:
        UserError: the file is missing, truncated or damaged, or a reader has raised `Unfit`.
    """
    try:
        yield
    except UserError:
        raise
    except (*_DAMAGE, Unfit) as error:
        raise _explain(name, error) from error


def _check_size(page: TiffPage) -> None:
    """Raise Pillow's error for a page of more pixels than its limit."""
    limit, pixels = 2 * (Image.MAX_IMAGE_PIXELS or 2**62), page.height * page.width
    if pixels > limit:
        raise Image.DecompressionBombError(f"Image size ({pixels} pixels) exceeds limit of {limit} pixels")


def _explain(path: str | Path, error: Exception) -> UserError:
    """Return the message for an error in reading an image."""
    unreadable = f"Cannot read {path} as an image"
    if isinstance(error, FileNotFoundError):
        return UserError(f"File not found: {path}. Check the path.")
    if isinstance(error, MemoryError):
        return UserError(f"Not enough memory to read {path} as an image. Free some, or reduce or split the image.")
    if isinstance(error, Image.DecompressionBombError):
        sizes = str(error).partition(", could be")[0]  # of an attack
        return UserError(f"{unreadable}: it is too large ({sizes}). Cut it into parts, or reduce it.")
    if isinstance(error, Unfit):
        return UserError(f"{path} {error}.")
    if isinstance(error, UnidentifiedImageError):
        return UserError(f"{unreadable}. It {_NO_PICTURE}.")
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"Cannot read {path} ({error.strerror}). Check the path and its disk.")
    return UserError(f"{unreadable} ({error}). It {_NO_PICTURE}.")
