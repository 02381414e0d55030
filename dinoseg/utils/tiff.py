"""Strict reading of TIFF files by tifffile: the stored values, block by block; missing blocks or bytes are an error.

The only door to tifffile, which is imported when the first TIFF file is read. Imports no torch.
"""

import math
import re
import struct
from functools import cached_property
from typing import IO, Any

import numpy as np
from PIL import Image

from dinoseg.utils.errors import Unfit
from dinoseg.utils.truncation import check_jpeg, find_jpeg_size

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes of TIFF and BigTIFF files of both byte orders
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, _MASK, CMYK, YCBCR = range(7)  # values of PhotometricInterpretation
_REDUCED, _OF_MASK = 1, 4  # bits of NewSubfileType: a smaller copy, a mask of valid pixels
_JPEG = 7  # value of Compression
# decoders that return no more than a block needs, and whose output is shorter if the block is
_COMPRESSIONS = {
    **{1: "none", 5: "LZW", _JPEG: "JPEG", 8: "Deflate", 32946: "Deflate", 32773: "PackBits"},
    **{34925: "LZMA", 50000: "Zstandard"},
}
_WIDTH, _HEIGHT, _SAMPLES, _ROWS, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 277, 278, 322, 323  # TIFF tags
_OFFSETS, _LENGTHS = (273, 324), (279, 325)  # TIFF tags: of strips, of tiles
_PHOTOMETRIC, _FILL_ORDER, _ORIENTATION, _COLORS, _EXTRA_SAMPLES, _XMP = 262, 266, 274, 320, 338, 700  # TIFF tags
# tags without which other values would be read
_LAYOUT = (258, 259, _PHOTOMETRIC, _FILL_ORDER, _ORIENTATION, _SAMPLES, 284, 317, _EXTRA_SAMPLES, 339)
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_ALPHA = (1, 2)  # values of ExtraSamples


class TiffPage:
    """Image in a TIFF file.

    Attributes:
        height, width: size as stored.
        samples: number of channels.
        is_unsigned: whether its values are unsigned integers.
        is_float: whether its values are floats.
        is_lossy: whether it is compressed by JPEG.
        bits: bits of each value.
        photometric: value of PhotometricInterpretation.
        orientation: 1 to 8, as in EXIF; 1 is upright.
        has_alpha: whether the channel after the colours is an alpha channel.
    """

    def __init__(self, page: Any, file: IO[bytes]) -> None:
        self._page, self._file = page, file
        self.height, self.width, self.samples = page.imagelength, page.imagewidth, page.samplesperpixel
        self.bits = page.bitspersample if isinstance(page.bitspersample, int) else 0  # 0: of different depths
        self.photometric = int(page.photometric)
        self.has_alpha = bool(page.extrasamples) and int(page.extrasamples[0]) in _ALPHA
        self.is_lossy = int(page.compression) == _JPEG
        self.is_unsigned = page.dtype is not None and page.dtype.kind in "bu"
        self.is_float = page.dtype is not None and page.dtype.kind == "f"
        self.kind = int(page.subfiletype)

    @cached_property
    def orientation(self) -> int:
        """Return the orientation by the tag, else by XMP."""
        value = self._page.tags.valueof(_ORIENTATION)
        if value is None and isinstance(xmp := self._page.tags.valueof(_XMP), bytes):
            match = _XMP_ORIENTATION.search(xmp)
            value = int(match[1]) if match else 1
        return value if isinstance(value, int) and 1 <= value <= 8 else 1

    @property
    def size(self) -> tuple[int, int]:
        """Return height and width of the upright image."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)

    @property
    def palette(self) -> np.ndarray:
        """Return the colours (N, 3) uint8 of a palette image."""
        colors = self._page.tags.valueof(_COLORS)
        return (np.reshape(colors, (3, -1)).T >> 8).astype(np.uint8)

    def read(self) -> np.ndarray:
        """Return the stored values (H, W, C), upright; JPEG's YCbCr as RGB, and bits as 0 and 1.

        Raises:
            Unfit: the page lacks blocks or bytes, or is of an unsupported kind.
        """
        rows, columns = self._check_layout()
        page = self._page
        is_contiguous = page.planarconfig == 1
        depth, inner = (1, self.samples) if is_contiguous else (self.samples, 1)
        values = np.empty((depth, self.height, self.width, inner), page.dtype.newbyteorder("="))
        for index in range(len(page.dataoffsets)):
            block, (plane, _, top, left, _), _ = self._decode(index, rows, columns)
            height, width = min(rows, self.height - top), min(columns, self.width - left)
            part = block[0, :height, :width]
            if part.shape != (height, width, inner):
                raise Unfit(f"is truncated: its TIFF block {index} lacks rows. Replace it")
            values[plane, top : top + height, left : left + width] = part
        # (planes, H, W, 1) or (1, H, W, C) to (H, W, C)
        return turn(values.transpose(1, 2, 3, 0).reshape(self.height, self.width, self.samples), self.orientation)

    def read_levels(self) -> np.ndarray:
        """Return the values (H, W, C), upright, with 0 as black: palettes, CMYK and YCbCr as RGB, 1 to 7 bits as 8.

        Raises:
            Unfit: see `read`, or its colours are of another kind.
        """
        values = self.read()
        if values.dtype.kind in "bu" and self.bits < 8 and self.photometric != PALETTE:
            values = np.round(values * (255 / self.white)).astype(np.uint8)
        if self.photometric in (BLACK_IS_ZERO, RGB) or (self.photometric == YCBCR and self.is_lossy):
            return values
        if self.photometric == WHITE_IS_ZERO and values.dtype.kind in "bu":
            return (255 if self.bits < 8 else values.dtype.type(self.white)) - values
        if self.photometric == PALETTE and values.dtype.kind in "bu":
            return self.palette[values[..., 0].astype(np.intp)]
        if self.photometric in (CMYK, YCBCR) and values.dtype == np.uint8:
            bands = {CMYK: 4, YCBCR: 3}[self.photometric]
            mode = {CMYK: "CMYK", YCBCR: "YCbCr"}[self.photometric]
            return np.asarray(Image.frombytes(mode, values.shape[1::-1], values[..., :bands].tobytes()).convert("RGB"))
        raise Unfit(
            f"stores {values.dtype} values with the TIFF tag PhotometricInterpretation={self.photometric}, which is "
            "not supported. Save it as grey or RGB, with 0 as black"
        )

    @property
    def white(self) -> int:
        """Return the highest value of unsigned integers of its depth."""
        return 2**self.bits - 1

    def _decode(self, index: int, rows: int, columns: int) -> tuple[np.ndarray, tuple[int, ...], tuple[int, ...]]:
        """Return a block of rows and columns up to a limit, its place, and its shape."""
        offset, length = self._page.dataoffsets[index], self._page.databytecounts[index]
        self._file.seek(offset)
        data = self._file.read(length)
        if not offset or not length or len(data) < length:  # programs that leave out blocks write 0
            raise Unfit(f"is truncated: its TIFF block {index} lacks data. Save it again with all blocks")
        if not self.is_lossy:
            return self._page.decode(data, index)
        height, width = find_jpeg_size(data)
        if not (0 < height <= rows and 0 < width <= columns):  # tifffile would read the first pixels
            raise Unfit(f"is damaged: its TIFF block {index} is a JPEG file of {width} x {height}. Replace it")
        tables = self._page.jpegtables
        found = self._page.decode(data, index, jpegtables=tables)
        check_jpeg(data, found[0][0], lambda data: self._page.decode(data, index, jpegtables=tables)[0][0])
        return found

    def _check_layout(self) -> tuple[int, int]:
        """Return rows and columns of a block; refuse kinds that would be read wrongly, or whose blocks do not fit."""
        page = self._page
        tags = self._read_tag_numbers()
        damaged = next((number for number in _LAYOUT if number in tags and number not in page.tags), None)
        compression = getattr(page.compression, "name", page.compression)
        is_number = page.dtype is not None and page.dtype.kind in "buif" and self.bits > 0
        unsupported = {
            f"a damaged TIFF tag {damaged}": damaged is not None,
            "no TIFF tag PhotometricInterpretation": _PHOTOMETRIC not in page.tags,
            f"TIFF compression {compression}": page.compression not in _COMPRESSIONS,
            f"values of {page.bitspersample} bits and TIFF sample format {page.sampleformat}": not is_number,
            f"a volume of {page.imagedepth} slices": page.imagedepth != 1,
            "colours at a lower resolution without JPEG": page.is_subsampled and not self.is_lossy,
        }
        if kind := next((name for name, is_stored in unsupported.items() if is_stored), None):
            raise Unfit(
                f"has {kind}, which is not supported. Save integers or floats of all pixels of one slice, compressed "
                f"by one of {', '.join(dict.fromkeys(_COMPRESSIONS.values()))}"
            )
        is_tiled = bool(page.tilewidth or page.tilelength)
        columns, rows = (page.tilewidth, page.tilelength) if is_tiled else (self.width, page.rowsperstrip)
        needed = math.ceil(self.width / columns) * math.ceil(self.height / rows)
        needed *= 1 if page.planarconfig == 1 else self.samples
        offsets = page.tags.get(_OFFSETS[is_tiled])
        # tifffile cuts or guesses lists of another length
        found = 0 if offsets is None else offsets.count
        if not found == needed == len(page.dataoffsets) == len(page.databytecounts):
            raise Unfit(f"has {found} TIFF blocks, but its pixels need {needed}. Save it again")
        return rows, columns

    def _read_tag_numbers(self) -> set[int]:
        """Return the numbers of the tags that the file stores: tifffile leaves out damaged ones and takes defaults."""
        form = self._page.parent.tiff
        self._file.seek(self._page.offset)
        (count,) = struct.unpack(form.tagnoformat, self._file.read(form.tagnosize))
        tags = self._file.read(count * form.tagsize)
        return {number for (number,) in struct.iter_unpack(f"{form.byteorder}H{form.tagsize - 2}x", tags)}


class TiffFile:
    """Opened TIFF file.

    Args:
        file: the file, which stays open.
    """

    def __init__(self, file: IO[bytes]) -> None:
        import tifffile

        file.seek(0)
        # its guesses for formats of microscopes would change offsets
        opened = tifffile.TiffFile(file, is_lsm=False, is_scanimage=False, is_ndpi=False, _multifile=False)
        self.stored_pages = [TiffPage(page, file) for page in opened.pages]
        # without smaller copies and masks of valid pixels
        self.pages = [page for page in self.stored_pages if not page.kind & (_REDUCED | _OF_MASK)]

    def get_only_page(self, remedy: str) -> TiffPage:
        """Return the page of a file that has one; others are refused, with a remedy.

        Raises:
            Unfit: there are several.
        """
        if len(self.pages) > 1:
            raise Unfit(f"has {len(self.pages)} pages, and one is read here. {remedy}, or save each page as a file")
        return self.pages[0]

    def read_valid(self) -> np.ndarray | None:
        """Return which pixels (H, W) the internal masks mark as valid; None if there are none."""
        masks = [page for page in self.stored_pages if page.kind & _OF_MASK and not page.kind & _REDUCED]
        if not masks:
            return None
        valid = [page.read()[..., 0] != 0 for page in masks]
        if any(each.shape != self.pages[0].size for each in valid):
            raise Unfit("has an internal mask of another size than its image. Save it again")
        return np.logical_and.reduce(valid)


def is_tiff(file: IO[bytes]) -> bool:
    """Return whether a file begins as a TIFF file; it is then at its start."""
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    return start in SIGNATURES


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return pixels (H, W, C) upright; `orientation` as in EXIF."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
