"""What is measured of one image and its mask: sizes, classes, colours and hashes; imports no torch."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from dinoseg.data.classes.mask_size import fit
from dinoseg.data.classes.masks import MaskReader
from dinoseg.errors import UserError
from dinoseg.images import read_ids, read_image, read_size
from dinoseg.storage.files import check_regular

SMALL = 64  # rows and columns of the small copies that are kept
_HASHED, _LOWEST = 32, 8  # the perceptual hash is of the 8 x 8 lowest frequencies of 32 x 32 pixels
_FLAT = 2.0  # grey levels of standard deviation below which a picture has no hash: it would be noise
_VALUES = 256  # file values that are listed
_ENDS = {b"\x89PNG": b"IEND", b"\xff\xd8": b"\xff\xd9"}  # first bytes to end mark
_TAIL = 4096  # bytes in which an end mark is looked for: cameras append their own
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes, of the large kind too
_STRIPS, _TILES = (273, 279), (324, 325)  # TIFF tags: where the parts of a picture begin, and their bytes
_LOSSY = ("JPEG", "MPO")


@dataclass(frozen=True)
class Record:
    """One pair, measured.

    Args:
        name: of the pair.
        image: the image file, as text.
        mask: the mask file, as text.
        image_size: height and width, None where unknown.
        mask_size: height and width in the file, None where unknown.
        mask_format: what the mask file is by its content, such as PNG or JPEG.
        pixels: class id or ignore_index to pixels, as training sees the mask; empty for a refused one.
        raw: number or colour in the mask file to pixels; at most 256 of them.
        problems: code to reason, of all that would stop a run.
        passing: whether a problem may be the disk's or the memory's, and gone the next time.
        mask_digest: hash of the ids.
        decoded: whether the image was decoded; what follows is known only then.
        image_digest: hash of the pixels.
        look: 64-bit perceptual hash (DCT), None of a flat picture.
        color_sums: of red, green and blue levels 0..255 over all pixels.
        color_squares: of their squares.
        edges: (64 * 64,) uint8, rank of the colour gradient of a small copy.
        borders: (64 * 64 / 8,) uint8, bits: where a small copy of the mask has borders.
    """

    name: str
    image: str
    mask: str
    image_size: tuple[int, int] | None = None
    mask_size: tuple[int, int] | None = None
    mask_format: str = ""
    pixels: Mapping[int, int] = field(default_factory=dict)
    raw: Mapping[str, int] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    passing: bool = False
    mask_digest: str = ""
    decoded: bool = False
    image_digest: str = ""
    look: int | None = None
    color_sums: tuple[int, ...] = ()
    color_squares: tuple[int, ...] = ()
    edges: bytes = b""
    borders: bytes = b""

    @property
    def counts(self) -> np.ndarray:
        """Return pixels (256,) int64 of each class id, those of ignore_index too."""
        counts = np.zeros(256, dtype=np.int64)
        counts[list(self.pixels)] = list(self.pixels.values())
        return counts


def measure(name: str, image: Any, mask: Path, reader: MaskReader, *, images: bool) -> Record:
    """Read one pair; a file that cannot be read is a problem in the record, never an error.

    Args:
        name: of the pair.
        image: an image file, or anything else with `read() -> (H, W, 3)`.
        mask: the mask file.
        reader: how masks are read.
        images: decode the image too; else only its header and its end are read, by which most cut files are found.
    """
    found: dict[str, Any] = {"decoded": images, "passing": False}
    problems: dict[str, str] = {}
    try:
        found |= _of_image(_read(image)) if images else {"image_size": _header_size(image)}
    except Exception as error:  # a decoder may raise anything on a damaged file
        problems["unreadable_image"] = _reason(image, error)
        found["passing"] |= _may_pass(error)
    try:
        _add_mask(mask, image, reader, found, problems)
    except Exception as error:
        problems["unreadable_mask"] = _reason(mask, error)
        found["passing"] |= _may_pass(error)
    return Record(name, str(image), str(mask), problems=problems, **found)


def _reason(file: Any, error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"Cannot read {file} ({error.strerror}). Check the path and its disk."
    return f"Cannot read {file} as a picture ({error})."


def _may_pass(error: BaseException | None) -> bool:
    """Return whether the machine is to blame, such as a disk or a network that failed, and not the file."""
    while error is not None:
        of_the_system = isinstance(error, OSError) and error.errno is not None  # a decoder's own has no number
        if of_the_system or isinstance(error, MemoryError) or getattr(error, "code", None) == cv2.Error.StsNoMem:
            return True
        error = error.__cause__ or error.__context__
    return False


def _of_image(pixels: np.ndarray) -> dict[str, Any]:
    levels = np.arange(256, dtype=np.int64)
    histograms = [np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)]
    return {
        "image_size": (pixels.shape[0], pixels.shape[1]),
        "image_digest": _digest(pixels),
        "look": perceptual_hash(pixels),
        "color_sums": tuple(int(histogram @ levels) for histogram in histograms),
        "color_squares": tuple(int(histogram @ levels**2) for histogram in histograms),
        "edges": _edges(pixels).tobytes(),
    }


def perceptual_hash(pixels: np.ndarray) -> int | None:
    """Return 64 bits that say which low frequencies of a picture (H, W, 3) are above their median; None if flat."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_HASHED, _HASHED), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.std() < _FLAT:
        return None
    waves = cv2.dct(small)[:_LOWEST, :_LOWEST].ravel()
    bits = waves > np.median(waves[1:])  # the first is the mean level
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _edges(pixels: np.ndarray) -> np.ndarray:
    """Return each small pixel's rank among the gradients: a rank survives differing exposure and contrast."""
    small = cv2.resize(pixels, (SMALL, SMALL), interpolation=cv2.INTER_AREA).astype(np.float32)
    across, down = cv2.Sobel(small, cv2.CV_32F, 1, 0), cv2.Sobel(small, cv2.CV_32F, 0, 1)
    steepness = np.hypot(across, down).max(axis=-1).ravel()  # (64 * 64,)
    ordered = np.sort(steepness)
    rank = np.searchsorted(ordered, steepness, "left") + np.searchsorted(ordered, steepness, "right")
    return (rank * (255 / (2 * rank.size))).astype(np.uint8)


def _add_mask(path: Path, image: Any, reader: MaskReader, found: dict[str, Any], problems: dict[str, str]) -> None:
    """Add what is found in a mask file.

    Raises:
        Exception: it cannot be read at all.
    """
    check_regular(path)
    with Image.open(path) as file:
        found |= {"mask_size": (file.height, file.width), "mask_format": file.format or ""}
    if found["mask_format"] in _LOSSY:
        problems["mask_is_jpeg"] = f"{path} is a JPEG file, which changes the numbers near borders. Save it as PNG."
    try:
        ids = reader.read(path)
    except UserError as error:
        if _may_pass(error):
            raise
        found["raw"] = _raw(path, reader)
        problems["foreign_ids"] = str(error)
        return
    found["mask_size"] = ids.shape
    try:
        size = found.get("image_size") or ids.shape
        ids = fit(ids, size, reader.masks.on_size_mismatch, image=image, path=path)
    except UserError as error:
        problems["size_mismatch"] = str(error)
    pixels = {int(value): int(count) for value, count in _counted(ids)}
    found |= {"pixels": pixels, "mask_digest": _digest(ids), "raw": _raw_of(path, reader, pixels)}
    if found["decoded"]:
        found["borders"] = _borders(ids).tobytes()


def _raw_of(path: Path, reader: MaskReader, pixels: Mapping[int, int]) -> dict[str, int]:
    """Return what the file holds; it is read again only where that differs from the class ids."""
    masks = reader.masks
    if masks.format == "palette" or (masks.format == "ids" and (masks.ids or masks.others or masks.reduce_zero_label)):
        return _raw(path, reader)
    scale = 255 if masks.format == "binary" else 1
    return {str(value * scale): count for value, count in pixels.items()}


def _raw(path: Path, reader: MaskReader) -> dict[str, int]:
    numbers = read_image(path) if reader.masks.format == "palette" else read_ids(path)
    if numbers.ndim == 3 and reader.masks.format != "palette" and (numbers == numbers[..., :1]).all():
        numbers = numbers[..., 0]
    if numbers.ndim == 2:
        return {str(value): int(count) for value, count in _counted(numbers)[:_VALUES]}
    codes = numbers[..., 0].astype(np.int32) << 16 | numbers[..., 1].astype(np.int32) << 8 | numbers[..., 2]
    common = sorted(_counted(codes), key=lambda pair: -pair[1])[:_VALUES]
    return {f"({code >> 16}, {code >> 8 & 255}, {code & 255})": int(count) for code, count in common}


def _counted(values: np.ndarray) -> list[tuple[int, int]]:
    if values.dtype == np.uint8:  # several times as fast as sorting
        counts = np.bincount(values.ravel(), minlength=256)
        return [(int(value), int(counts[value])) for value in np.flatnonzero(counts)]
    return list(zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True))


def _borders(ids: np.ndarray) -> np.ndarray:
    small = cv2.resize(ids, (SMALL, SMALL), interpolation=cv2.INTER_NEAREST_EXACT)
    borders = np.zeros((SMALL, SMALL), dtype=bool)
    across, down = small[:, 1:] != small[:, :-1], small[1:] != small[:-1]
    borders[:, 1:] |= across
    borders[:, :-1] |= across
    borders[1:] |= down
    borders[:-1] |= down
    return np.packbits(borders)


def _digest(pixels: np.ndarray) -> str:
    digest = hashlib.blake2b(str(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def _read(image: Any) -> np.ndarray:
    return np.ascontiguousarray(read_image(image) if isinstance(image, str | Path) else image.read())


def _header_size(image: Any) -> tuple[int, int] | None:
    """Return height and width as `read_image` would, without decoding; None of a video's frame.

    Raises:
        UserError: the file is no picture, or ends too early and cannot be decoded either.
    """
    if not isinstance(image, str | Path):
        return None
    check_regular(image)
    if _ends_early(Path(image)):
        read_image(image)
    return read_size(image)


def _ends_early(path: Path) -> bool:
    """Return whether a file's end is not where its kind or its header says, as that of most truncated files.

    It costs two short reads; of TIFF files, those of the header.
    """
    with path.open("rb") as file:
        start = file.read(8)
        size = file.seek(0, os.SEEK_END)
        if mark := next((mark for magic, mark in _ENDS.items() if start.startswith(magic)), None):
            file.seek(max(0, size - _TAIL))
            return mark not in file.read()
    if start.startswith(b"BM"):
        promised = int.from_bytes(start[2:6], "little")
        return promised == 0 or size < promised  # some writers leave it at 0
    if start.startswith(b"RIFF"):
        return size < 8 + int.from_bytes(start[4:8], "little")
    return start.startswith(_TIFF) and size < _end_of_tiff(path)


def _end_of_tiff(path: Path) -> int:
    with Image.open(path) as file:
        tags = getattr(file, "tag_v2", {})
        parts = [zip(tags.get(begin, ()), tags.get(count, ()), strict=False) for begin, count in (_STRIPS, _TILES)]
        return max((begin + count for part in parts for begin, count in part), default=0)
