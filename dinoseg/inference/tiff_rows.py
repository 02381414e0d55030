"""Block-by-block reader of TIFF files that are too large for memory."""

import io
import math
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from torch import Tensor

from dinoseg.inference.rows import LONGEST, Rows, Size, as_rows
from dinoseg.utils.errors import UserError
from dinoseg.utils.image_cost import Unfit, check_tags
from dinoseg.utils.images import read_orientation

_GREY, _RGB, _YCBCR = 1, 2, 6  # photometric interpretations
_NONE, _JPEG = 1, 7  # compressions
_DECODED = (5, _JPEG, 8, 32773, 32946, 50000)  # in addition: LZW, deflate, PackBits, Zstandard
_KEPT = (258, 259, 262, 277, 317, 347, 530)  # tags: bits, compression, colours, channels, predictor, JPEG tables
_LARGEST_BLOCK = 2**28  # bytes of a decoded strip or tile


class TiffLayout:
    """Block layout of an 8-bit greyscale or RGB TIFF file: tiles, or strips as wide as the image."""

    def __init__(self, tags: ImageFileDirectory_v2) -> None:
        self.size: Size = (int(tags[257]), int(tags[256]))
        self.channels = int(tags.get(277, 1))
        self.tiled = tiled = 324 in tags
        self.block: Size = (
            (int(tags[323]), int(tags[322])) if tiled else (min(int(tags.get(278, 2**32)), self.size[0]), self.size[1])
        )
        self.offsets, self.lengths = (tuple(map(int, tags[key])) for key in ((324, 325) if tiled else (273, 279)))
        self.compression, self.predictor = int(tags.get(259, 1)), int(tags.get(317, 1))
        self.decoding_tags = {key: tags[key] for key in _KEPT if key in tags}  # tags needed to decode a block

    @classmethod
    def of(cls, path: Path) -> "TiffLayout | None":
        """Read the tags of the first image; None: its kind cannot be read in blocks.

        Raises:
            UserError: the file is no TIFF file, or is truncated or damaged.
        """
        try:
            with path.open("rb") as file, warnings.catch_warnings():
                warnings.simplefilter("error")  # Pillow only warns about truncated tags
                check_tags(file)
                file.seek(0)
                header = file.read(8)
                header += file.read(8) if header[2:3] == b"\x2b" or header[3:4] == b"\x2b" else b""
                tags = ImageFileDirectory_v2(header)
                file.seek(tags.next)
                tags.load(file)
                bits, kind, format_ = (tags.get(key, usual) for key, usual in ((258, (1,)), (262, None), (339, (1,))))
                plain = {*bits} == {8} and {*format_} == {1}
                plain = plain and all(tags.get(key, 1) == 1 for key in (266, 284)) and not _is_turned(tags)
                kinds = ((_GREY, 1), (_RGB, 3), *([(_YCBCR, 3)] if tags.get(259) == _JPEG else []))
                if not plain or (kind, int(tags.get(277, 1))) not in kinds:
                    return None
                layout = cls(tags)
        except Unfit as error:
            raise UserError(f"{path} {error}.") from None
        except (OSError, SyntaxError, KeyError, ValueError, TypeError, struct.error, Warning) as error:
            raise UserError(f"Cannot read {path} as a TIFF file ({error}). It is truncated or not an image.") from error
        return layout._usable(path)

    def _usable(self, path: Path) -> "TiffLayout | None":
        whole = 0 < min(*self.size, *self.block) and max(self.size) <= LONGEST
        blocks = self.across * math.ceil(self.size[0] / self.block[0]) if whole else 0
        if not whole or min(len(self.offsets), len(self.lengths)) < blocks:
            raise UserError(f"{path}: its tags give {self.size} pixels in too few blocks. It is damaged: replace it.")
        block = math.prod(self.block) * self.channels  # bytes
        known = self.is_raw or (self.compression in _DECODED and block <= _LARGEST_BLOCK)
        return self if known and self.predictor in (1, 2) and not (self.predictor == 2 and self.is_raw) else None

    @property
    def across(self) -> int:
        """Number of blocks side by side."""
        return math.ceil(self.size[1] / self.block[1])

    @property
    def is_raw(self) -> bool:
        """True if blocks are stored uncompressed."""
        return self.compression == _NONE


class TiffRows(Rows):
    """Rows of an 8-bit TIFF file, read one strip or one row of tiles at a time; Pillow decodes the blocks."""

    count = 1

    def __init__(self, path: Path, layout: TiffLayout, device: torch.device) -> None:
        self.path, self.layout, self.size, self.device = path, layout, layout.size, device
        self._number, self._decoded = -1, np.empty(0)  # the row of blocks decoded last

    def read(self, top: int, bottom: int) -> Tensor:
        """Return the rows (1, 3, bottom - top, W) uint8.

        Raises:
            UserError: the file is truncated, or a block cannot be decoded.
        """
        height = self.layout.block[0]
        parts = []
        for number in range(top // height, (bottom - 1) // height + 1):
            first, last = max(top - number * height, 0), min(bottom - number * height, height)
            if self.layout.is_raw:
                parts.append(self._blocks(number, lambda *where, rows=(first, last): self._stored(*where, *rows)))
                continue
            if number != self._number:
                self._number, self._decoded = number, self._blocks(number, self._unpacked)
            parts.append(self._decoded[first:last])
        return as_rows(np.concatenate(parts), self.device)

    def _blocks(self, number: int, read: Callable[[BinaryIO, int], np.ndarray]) -> np.ndarray:
        """Return a row of blocks (r, W, channels), concatenated and cropped to the image's width."""
        across = self.layout.across
        with self.path.open("rb") as file:
            blocks = [read(file, number * across + column) for column in range(across)]
        return np.concatenate(blocks, axis=1)[:, : self.size[1]]

    def _stored(self, file: BinaryIO, number: int, first: int, last: int) -> np.ndarray:
        """Return rows of an uncompressed block (last - first, width, channels)."""
        layout = self.layout
        line = layout.block[1] * layout.channels
        file.seek(layout.offsets[number] + first * line)
        found = file.read((last - first) * line)
        if len(found) < (last - first) * line:
            raise UserError(f"{self.path} ends before its last row. It is truncated: replace it.")
        return np.frombuffer(found, np.uint8).reshape(last - first, layout.block[1], layout.channels)

    def _unpacked(self, file: BinaryIO, number: int) -> np.ndarray:
        """Return a block (height, width, channels), decoded by Pillow as a TIFF file of its own."""
        layout = self.layout
        height, width = layout.block
        if not layout.tiled:  # the last strip ends with the image
            height = min(height, self.size[0] - number * height)
        file.seek(layout.offsets[number])
        packed = file.read(layout.lengths[number])
        tags = ImageFileDirectory_v2(b"II*\0" + bytes(4))
        # one strip; Pillow counts strip offsets from the end of the tags: 0 is the first byte behind them
        for key, value in {
            **layout.decoding_tags,
            256: width,
            257: height,
            273: 0,
            278: height,
            279: len(packed),
        }.items():
            tags[key] = value
        alone = b"II*\0" + struct.pack("<I", 8) + tags.tobytes(8) + packed
        try:
            with TiffImageFile(io.BytesIO(alone)) as image:
                pixels = np.asarray(image.convert("RGB") if layout.channels == 3 else image)
        except (OSError, SyntaxError, KeyError, ValueError, TypeError, struct.error) as error:
            raise UserError(f"{self.path}: a block cannot be decoded ({error}). It is damaged: replace it.") from error
        return pixels.reshape(height, width, layout.channels)


def _is_turned(tags: ImageFileDirectory_v2) -> bool:
    """Return whether tag 274 or, without it, XMP (tag 700) holds an orientation other than upright."""
    if 274 in tags:
        return bool(tags[274] != 1)
    image, xmp = Image.new("1", (1, 1)), tags.get(700)
    if isinstance(xmp, bytes):
        image.info["xmp"] = xmp
    return read_orientation(image) != 1
