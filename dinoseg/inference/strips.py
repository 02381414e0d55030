"""Images too large to hold: rows read from the file as they are needed, class ids written as they are done."""

import math
import struct
import warnings
import zlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torch import Tensor

from dinoseg.errors import UserError
from dinoseg.images import read_image
from dinoseg.inference.rows import HeldRows, Rows, Size
from dinoseg.storage.files import check_regular

MOST_HELD = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)  # pixels from which on Pillow refuses
_TIFF = (".tif", ".tiff")
_NONE, _DEFLATE = (1,), (8, 32946)  # compressions
_GREY, _RGB = 1, 2  # photometric interpretations
_LARGEST_BLOCK = 2**28  # bytes of a strip or tile once it is decompressed
_LONGEST = 2**20  # pixels of a side
_LATER = (
    "Images of any size are read from a TIFF file of 8 bits, grey or RGB, uncompressed or deflated, in strips or "
    "tiles; and from a .npy file, (H, W, 3) uint8."
)


def open_rows(path: str | Path, device: torch.device) -> Rows:
    """Return an image file as rows: of a TIFF or .npy file read when they are asked for, of any other held.

    Raises:
        UserError: the file is missing, truncated or no picture, or is too large and of a kind that has to be held.
    """
    path = Path(path)
    check_regular(path)
    if path.suffix.lower() == ".npy":
        return ArrayRows(path, device)
    if path.suffix.lower() in _TIFF:
        layout = _Tiff.of(path)
        if layout is not None:
            return TiffRows(path, layout, device)
    try:
        image = read_image(path)
    except UserError as error:
        raise UserError(f"{error} {_LATER}") from error
    return HeldRows(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(device))


def only_in_strips(path: Path) -> bool:
    """Return whether an image file is too large for `read_image`, and of a kind that is read in strips."""
    if path.suffix.lower() not in _TIFF:
        return False
    try:
        layout = _Tiff.of(path)
    except UserError:  # reading it says so
        return False
    return layout is not None and math.prod(layout.size) > MOST_HELD


class ArrayRows(Rows):
    """Rows of an array (H, W, 3) uint8 in a .npy file, of which nothing is unpickled."""

    count = 1

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            self.pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"Cannot read {path} as an array ({error}). Write it with numpy.save.") from error
        shape: tuple[int, ...] = getattr(self.pixels, "shape", ())
        if len(shape) != 3 or shape[2] != 3 or self.pixels.dtype != np.uint8 or 0 in shape:
            raise UserError(f"{path} holds {shape} of {self.pixels.dtype}, and must hold (H, W, 3) of uint8, RGB.")
        self.size, self.device = (shape[0], shape[1]), device

    def read(self, top: int, bottom: int) -> Tensor:
        """Return the rows (1, 3, bottom - top, W) uint8."""
        return _as_rows(np.array(self.pixels[top:bottom]), self.device)


class _Tiff:
    """Where the blocks of a TIFF file lie: tiles, or strips as wide as the image."""

    def __init__(self, tags: ImageFileDirectory_v2) -> None:
        self.size: Size = (int(tags[257]), int(tags[256]))
        self.channels = int(tags.get(277, 1))
        tiled = 324 in tags
        self.block: Size = (
            (int(tags[323]), int(tags[322])) if tiled else (min(int(tags.get(278, 2**32)), self.size[0]), self.size[1])
        )
        self.offsets, self.lengths = (tuple(map(int, tags[key])) for key in ((324, 325) if tiled else (273, 279)))
        self.compression, self.predictor = int(tags.get(259, 1)), int(tags.get(317, 1))
        self.across = math.ceil(self.size[1] / self.block[1])
        self.bytes = math.prod(self.block) * self.channels

    @classmethod
    def of(cls, path: Path) -> "_Tiff | None":
        """Read the first image's tags; None: it is of a kind that is not read in blocks.

        Raises:
            UserError: it is no TIFF file.
        """
        try:
            with path.open("rb") as file, warnings.catch_warnings():
                warnings.simplefilter("error")  # of tags that end too early, Pillow only warns
                header = file.read(8)
                header += file.read(8) if header[2:3] == b"\x2b" or header[3:4] == b"\x2b" else b""
                tags = ImageFileDirectory_v2(header)
                file.seek(tags.next)
                tags.load(file)
                bits, kind, format_ = (tags.get(key, usual) for key, usual in ((258, (1,)), (262, None), (339, (1,))))
                plain = {*bits} == {8} and {*format_} == {1} and tags.get(284, 1) == 1 and tags.get(274, 1) == 1
                shape = (kind, int(tags.get(277, 1)))
                if not plain or shape not in ((_GREY, 1), (_RGB, 3)):
                    return None
                layout = cls(tags)
        except (OSError, SyntaxError, KeyError, ValueError, TypeError, struct.error, Warning) as error:
            raise UserError(f"Cannot read {path} as a TIFF file ({error}). It is truncated or no picture.") from error
        return layout._usable(path)

    def _usable(self, path: Path) -> "_Tiff | None":
        whole = 0 < min(*self.size, *self.block) and max(self.size) <= _LONGEST
        blocks = self.across * math.ceil(self.size[0] / self.block[0]) if whole else 0
        if not whole or min(len(self.offsets), len(self.lengths)) < blocks:
            raise UserError(f"{path}: its tags name {self.size} pixels in too few blocks. It is damaged: replace it.")
        known = self.compression in _NONE or (self.compression in _DEFLATE and self.bytes <= _LARGEST_BLOCK)
        return self if known and self.predictor in (1, 2) and not (self.predictor == 2 and self.is_raw) else None

    @property
    def is_raw(self) -> bool:
        """Whether blocks are not compressed."""
        return self.compression in _NONE


class TiffRows(Rows):
    """Rows of a TIFF file of 8 bits, read a strip or a row of tiles at a time."""

    count = 1

    def __init__(self, path: Path, layout: _Tiff, device: torch.device) -> None:
        self.path, self.layout, self.size, self.device = path, layout, layout.size, device

    def read(self, top: int, bottom: int) -> Tensor:
        """Return the rows (1, 3, bottom - top, W) uint8.

        Raises:
            UserError: the file ends before, or a block cannot be decompressed.
        """
        layout = self.layout
        height, width = layout.block
        pixels = np.empty((bottom - top, self.size[1], layout.channels), np.uint8)
        with self.path.open("rb") as file:
            for row in range(top // height, (bottom - 1) // height + 1):
                first, last = max(top, row * height), min(bottom, (row + 1) * height)
                for column in range(layout.across):
                    part = self._block(file, row * layout.across + column, first - row * height, last - row * height)
                    left = column * width
                    fits = min(width, self.size[1] - left)
                    pixels[first - top : last - top, left : left + fits] = part[:, :fits]
        return _as_rows(pixels, self.device)

    def _block(self, file: BinaryIO, number: int, first: int, last: int) -> np.ndarray:
        """Return rows of a strip or tile (last - first, width, channels)."""
        layout = self.layout
        line = layout.block[1] * layout.channels
        file.seek(layout.offsets[number] + (first * line if layout.is_raw else 0))
        if layout.is_raw:
            found = file.read((last - first) * line)
        else:
            try:
                found = zlib.decompressobj().decompress(file.read(layout.lengths[number]), last * line)[first * line :]
            except zlib.error as error:
                raise UserError(f"{self.path}: a block cannot be decompressed ({error}). Replace the file.") from error
        if len(found) < (last - first) * line:
            raise UserError(f"{self.path} ends before its last row. It is truncated: replace it.")
        block = np.frombuffer(found, np.uint8).reshape(last - first, layout.block[1], layout.channels)
        return block.cumsum(axis=1, dtype=np.uint8) if layout.predictor == 2 else block


class PngRows:
    """A PNG file of class ids, grey of 8 bits, written as rows are done.

    Args:
        path: of the file.
        size: (H, W) of all rows.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, size: Size) -> None:
        self.size = size
        self._packer = zlib.compressobj(1)
        self._file = path.open("wb")
        self._file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], 8, 0, 0, 0, 0))

    def __enter__(self) -> "PngRows":
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Write the end, unless something went wrong."""
        with self._file:
            if kind is None:
                self._chunk(b"IDAT", self._packer.flush())
                self._chunk(b"IEND", b"")

    def write(self, ids: np.ndarray) -> None:
        """Write the next rows (r, W) uint8."""
        lines = np.zeros((len(ids), self.size[1] + 1), np.uint8)  # each begins with how it is filtered: not at all
        lines[:, 1:] = ids
        packed = self._packer.compress(lines.tobytes())
        if packed:
            self._chunk(b"IDAT", packed)

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self._file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def _as_rows(pixels: np.ndarray, device: torch.device) -> Tensor:
    """Return rows (r, W, 1 or 3) as (1, 3, r, W)."""
    rows = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device)
    return rows.expand(1, 3, -1, -1) if rows.shape[1] == 1 else rows
