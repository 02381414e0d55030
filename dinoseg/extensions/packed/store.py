"""Packed images and masks in one file: raw bytes at known offsets, each item read by one call."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np

from dinoseg.core.sources import MAX_PIXELS
from dinoseg.utils import forms
from dinoseg.utils.atomic import write_text
from dinoseg.utils.errors import UserError
from dinoseg.utils.units import read_valid_note

PIXELS, INDEX = "pixels.bin", "index.json"
VERSION = 4  # format version: a store of another version is packed again
_EXTENT_FORM = forms.row(  # the fields of `Extent`, in order
    *(forms.whole(), forms.whole(1), forms.whole(1), forms.whole(0, 2**32 - 1)),
    *(forms.whole(1, 1024), forms.whole(1, 2), forms.whole(0, 2**20)),
)
_INDEX_FORM = forms.record(key=forms.plain, names=forms.list_of(forms.text), places=forms.list_of(_EXTENT_FORM))


@dataclass(frozen=True)
class StoreKey:
    """Everything that the bytes of a store depend on.

    Args:
        fingerprint: fingerprint of the packed dataset.
        longest: larger images were reduced until their longer side had this many pixels; None: none was reduced.
        version: version of the format.
    """

    fingerprint: str
    longest: int | None
    version: int = VERSION

    @property
    def folder(self) -> str:
        """Name of the store's folder."""
        return f"packed_{self.longest or 'full'}_{self.fingerprint[:16]}"


@dataclass(frozen=True)
class Extent:
    """Byte range of an item: the image (H, W, C), then the mask (H, W), then the objects (N, H, W) of 4 bytes."""

    offset: int
    height: int
    width: int
    crc: int
    channels: int = 3
    depth: int = 1  # bytes of a level of the image
    layers: int = 0  # of objects

    @property
    def image_size(self) -> int:
        """Bytes of the image."""
        return self.channels * self.depth * self.height * self.width

    @property
    def size(self) -> int:
        """Bytes of image, mask and objects."""
        return self.image_size + (1 + 4 * self.layers) * self.height * self.width


class Store:
    """Finished store.

    Args:
        folder: folder of the store.
        names: names of its items.
        extents: byte ranges of its items.
    """

    def __init__(self, folder: Path, names: Sequence[str], extents: Sequence[Extent]) -> None:
        self.folder = folder
        self.names = names
        self.extents = extents
        self._verified: set[int] = set()  # rows whose checksum this process has compared

    @property
    def size(self) -> int:
        """Bytes of all items."""
        return sum(extent.size for extent in self.extents)

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a copy of an image (H, W, C), uint8 or uint16, of its mask (H, W) uint8, and of its objects.

        Objects are (N, H, W) int32; N is 0 for data without objects.

        Raises:
            UserError: the file is gone, or its bytes differ from those that were packed.
        """
        extent = self.extents[row]
        item = self._bytes(extent.offset, extent.size)
        levels = item[: extent.image_size].view(np.uint8 if extent.depth == 1 else np.uint16)
        image = levels.reshape(extent.height, extent.width, extent.channels)
        pixels = extent.height * extent.width
        mask = item[extent.image_size : extent.image_size + pixels].reshape(extent.height, extent.width)
        # a copy, since bytes of an image of odd size leave the numbers unaligned
        objects = item[extent.image_size + pixels :].copy().view(np.int32).reshape(-1, extent.height, extent.width)
        if row not in self._verified:
            if checksum(self.names[row], image, mask, objects) != extent.crc:
                raise UserError(
                    f"{self.folder / PIXELS} is damaged: item {self.names[row]} does not match its checksum. Delete "
                    f"the folder {self.folder}: the next run packs it again. If this recurs, check the disk."
                )
            self._verified.add(row)
        return image, mask, objects

    def mask(self, row: int) -> np.ndarray:
        """Return a copy of a mask (H, W) uint8; skip reading its image if the item is already verified.

        Raises:
            UserError: see `read`.
        """
        if row not in self._verified:
            return self.read(row)[1]
        extent = self.extents[row]
        pixels = extent.height * extent.width
        return self._bytes(extent.offset + extent.image_size, pixels).reshape(extent.height, extent.width)

    def _bytes(self, offset: int, size: int) -> np.ndarray:
        """Return bytes of the file; not memory-mapped, since reading a map of a truncated file kills the process."""
        path = self.folder / PIXELS
        try:
            item = np.fromfile(path, np.uint8, count=size, offset=offset)
        except OSError as error:
            raise UserError(_missing_error(path, str(error))) from None
        if len(item) < size:
            raise UserError(_missing_error(path, "it is truncated"))
        return item


def open_store(folder: Path, key: StoreKey, names: Sequence[str]) -> Store | None:
    """Return a finished store, or None if there is no complete one with this key."""

    def read(path: Path) -> Store:
        index = forms.read_json(path, _INDEX_FORM)
        if index["key"] != asdict(key) or index["names"] != list(names) or len(index["places"]) != len(names):
            raise forms.SchemaError("it belongs to another dataset")
        return Store(folder, names, [Extent(*numbers) for numbers in index["places"]])

    def is_complete(store: Store) -> bool:
        size = (folder / PIXELS).stat().st_size  # apparent size: a sparse file need not occupy it
        return all(
            extent.offset + extent.size <= size and extent.height * extent.width <= MAX_PIXELS
            for extent in store.extents
        )

    return read_valid_note(folder / INDEX, read, is_complete)


def write_index(folder: Path, key: StoreKey, names: Sequence[str], extents: Sequence[Extent]) -> None:
    """Write the index that `open_store` reads."""
    numbers = [list(astuple(extent)) for extent in extents]
    content = {"key": asdict(key), "names": list(names), "places": numbers}
    write_text(folder / INDEX, json.dumps(content))


def checksum(name: str, image: np.ndarray, mask: np.ndarray, objects: np.ndarray) -> int:
    """Return the CRC-32 of an item's name, of its image's shape and type, and of the bytes of all its arrays."""
    crc = zlib.crc32(f"{name} {image.shape} {image.dtype.itemsize}".encode(errors="surrogateescape"))
    for part in (image, mask, objects):
        crc = zlib.crc32(np.ascontiguousarray(part).data, crc)
    return crc


def _missing_error(path: Path, reason: str) -> str:
    return (
        f"Cannot read {path} ({reason}). The packed data was removed or truncated during this run. Run again: missing "
        "images are packed again; resume a training with resume=auto."
    )
