"""Row-by-row reader and writer of PNG files that are too large for memory."""

import io
import struct
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import torch
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from dinoseg.inference.rows import LONGEST, Rows, Size, as_rows
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import open_bounded, read_orientation

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3
_CHANNELS = {_GREY: 1, 2: 3, _PALETTE: 1, 4: 2, 6: 4}  # channels of each colour type at 8 bits
_PIECE = 2**16  # bytes read or decompressed at once
_BAND = 2**22  # bytes unfiltered at once, at least one row
_KEPT = 2**27  # bytes of rows cached for overlapping windows and other scales


class PngLayout:
    """Header of a PNG file with 8 bits per channel and no interlacing.

    Attributes:
        size: (H, W).
        kind: colour type, numbered as in the PNG specification.
        palette: (256, 3) uint8; None: the file has no palette.
        start: file offset of the first IDAT chunk.
    """

    def __init__(self, size: Size, kind: int, palette: np.ndarray | None, start: int) -> None:
        self.size, self.kind, self.palette, self.start = size, kind, palette, start

    @classmethod
    def of(cls, path: Path) -> "PngLayout | None":
        """Read a file's header; None: it is no PNG file, or of a kind that cannot be read row by row.

        Raises:
            UserError: the file is damaged, or its header has too many chunks.
        """
        palette, size, kind = None, None, -1
        with open_bounded(path) as file:
            if file.read(8) != _SIGNATURE:
                return None
            while (found := _chunk_at(file, path))[1] != b"IDAT":
                length, name = found
                # other chunks are skipped, whatever length they state
                content = file.read(length) if name in (b"IHDR", b"PLTE") and length < _PIECE else b""
                if content and file.read(4) != struct.pack(">I", zlib.crc32(name + content)):
                    raise UserError(f"{path} does not match its checksums. It is damaged: replace it.")
                file.seek(0 if content else length + 4, io.SEEK_CUR)
                if name == b"IHDR" and len(content) == 13:
                    width, height, bits, kind, *rest = struct.unpack(">IIBBBBB", content)
                    size = (height, width)
                    if bits != 8 or kind not in _CHANNELS or any(rest) or max(size) > LONGEST:
                        return None
                if name == b"PLTE":
                    colours = np.frombuffer(content, np.uint8)[: 3 * 256]
                    palette = np.zeros((256, 3), np.uint8)
                    palette[: len(colours) // 3] = colours[: len(colours) // 3 * 3].reshape(-1, 3)
            if size is None or 0 in size or (kind == _PALETTE and palette is None):
                raise UserError(f"{path}: its header lacks a size or palette. It is damaged: replace it.")
            start = file.tell() - 8
        return None if _is_turned(path) else cls(size, kind, palette, start)


class PngFileRows(Rows):
    """Rows of a PNG file, decompressed from the top down; reading above the cached rows restarts decompression."""

    count = 1

    def __init__(self, path: Path, layout: PngLayout, device: torch.device) -> None:
        self.path, self.layout, self.size, self.device = path, layout, layout.size, device
        self._begin()

    def read(self, top: int, bottom: int) -> Tensor:
        """Return the rows (1, 3, bottom - top, W) uint8.

        Raises:
            UserError: the file is truncated or damaged.
        """
        if self._buffered and top < self._buffered[0][0]:
            self._begin()
        while self._next < bottom:
            band = next(self._bands)
            self._buffered.append((self._next, band))
            self._next += len(band)
            while len(self._buffered) * band.nbytes > _KEPT and self._buffered[1][0] <= top:
                self._buffered.popleft()
        parts = [
            band[max(top - start, 0) : bottom - start]
            for start, band in self._buffered
            if start < bottom and start + len(band) > top
        ]
        return as_rows(np.concatenate(parts), self.device)

    def _begin(self) -> None:
        self._bands, self._next = self._unfiltered(), 0
        self._buffered: deque[tuple[int, np.ndarray]] = deque()  # (first row, band)

    def _unfiltered(self) -> Iterator[np.ndarray]:
        """Yield bands of rows (r, W, 1 or 3).

        Pillow unfilters each band as a separate PNG, with the previous row on top.
        """
        layout = self.layout
        height, width = self.size
        channels = _CHANNELS[layout.kind]
        line = width * channels + 1
        step = max(1, _BAND // line)
        kind = _GREY if layout.kind == _PALETTE else layout.kind
        above, lines, found = bytes(line), self._decompressed(), bytearray()  # each line starts with its filter type
        for top in range(0, height, step):
            count = min(step, height - top)
            while len(found) < count * line:
                found += next(lines)
            header = struct.pack(">IIBBBBB", width, count + 1, 8, kind, 0, 0, 0)
            packed = zlib.compress(above + found[: count * line], 0)
            alone = _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")
            del found[: count * line]
            try:
                with PngImageFile(io.BytesIO(alone)) as image:
                    pixels = np.asarray(image).reshape(count + 1, width, channels)[1:]
            except (OSError, SyntaxError, ValueError) as error:
                raise UserError(f"{self.path}: its rows cannot be read ({error}). Replace the file.") from error
            above = b"\0" + pixels[-1].tobytes()
            colours = pixels[..., :3] if channels > 2 else pixels[..., :1]
            yield np.ascontiguousarray(colours) if layout.palette is None else layout.palette[colours[..., 0]]

    def _decompressed(self) -> Iterator[bytes]:
        """Yield decompressed bytes, still filtered, in pieces; raise `UserError` when the data end."""
        packer = zlib.decompressobj()
        try:
            for piece in self._pieces():
                found = packer.decompress(piece, _PIECE)
                yield found
                while packer.unconsumed_tail or len(found) == _PIECE:
                    found = packer.decompress(packer.unconsumed_tail, _PIECE)
                    yield found
        except zlib.error as error:
            raise UserError(f"{self.path} cannot be decompressed ({error}). It is damaged: replace it.") from error
        raise UserError(f"{self.path} ends before its last row. It is truncated: replace it.")

    def _pieces(self) -> Iterator[bytes]:
        """Yield the data of the IDAT chunks and verify each chunk's checksum."""
        with self.path.open("rb") as file:
            file.seek(self.layout.start)
            while (found := _chunk_at(file, self.path))[1] == b"IDAT":
                left, check = found[0], zlib.crc32(b"IDAT")
                while left and (piece := file.read(min(left, _PIECE))):
                    left, check = left - len(piece), zlib.crc32(piece, check)
                    yield piece
                if file.read(4) != struct.pack(">I", check):
                    raise UserError(f"{self.path} does not match its checksums. It is damaged: replace it.")


class PngWriter:
    """Row-by-row writer of class IDs to an 8-bit greyscale PNG file.

    Args:
        path: the file.
        size: (H, W) of the image.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, size: Size) -> None:
        self.size = size
        self._packer = zlib.compressobj(1)
        self._file = path.open("wb")
        self._file.write(_SIGNATURE)
        self._write(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], 8, 0, 0, 0, 0))

    def __enter__(self) -> "PngWriter":
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Write the final chunks, unless an exception was raised."""
        with self._file:
            if kind is None:
                self._write(b"IDAT", self._packer.flush())
                self._write(b"IEND", b"")

    def write(self, ids: np.ndarray) -> None:
        """Write the next rows (r, W) uint8."""
        lines = np.zeros((len(ids), self.size[1] + 1), np.uint8)  # each line starts with filter type 0 (none)
        lines[:, 1:] = ids
        packed = self._packer.compress(lines.tobytes())
        if packed:
            self._write(b"IDAT", packed)

    def _write(self, name: bytes, content: bytes) -> None:
        self._file.write(_chunk(name, content))


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _chunk_at(file: BinaryIO, path: Path) -> tuple[int, bytes]:
    """Return length and name of the chunk at the file's position."""
    head = file.read(8)
    if len(head) < 8:
        raise UserError(f"{path} ends before its last row. It is truncated: replace it.")
    return int.from_bytes(head[:4], "big"), head[4:]


def _is_turned(path: Path) -> bool:
    try:
        with PngImageFile(path) as image:  # `Image.open` would refuse the file for its size alone
            return read_orientation(image) != 1
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise UserError(f"{path}: its header cannot be read ({error}). It is damaged: replace it.") from error
