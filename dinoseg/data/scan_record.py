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

from dinoseg.data.masks import MaskReader
from dinoseg.errors import UserError
from dinoseg.images import read_ids, read_image

SMALL = 64  # rows and columns of the small copies that are kept
_HASHED, _LOWEST = 32, 8  # the perceptual hash is of the 8 x 8 lowest frequencies of 32 x 32 pixels
_FLAT = 2.0  # grey levels of standard deviation below which a picture has no hash: it would be noise
_PROPORTIONS = 0.05  # a mask may be resized whose proportions differ so much from its image's
_VALUES = 256  # file values that are listed
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112
_ENDS = {b"\x89PNG": b"IEND", b"\xff\xd8": b"\xff\xd9"}  # first bytes to end mark
_TAIL = 4096  # bytes in which an end mark is looked for: cameras append their own


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
        images: decode the image too; else only its header and its end are read.
    """
    found: dict[str, Any] = {"decoded": images}
    problems: dict[str, str] = {}
    try:
        found |= _of_image(_read(image)) if images else {"image_size": _header_size(image)}
    except Exception as error:  # a decoder may raise anything on a damaged file
        problems["unreadable_image"] = _reason(image, error)
    try:
        found |= _of_mask(mask, reader, found, problems)
    except Exception as error:
        problems["unreadable_mask"] = _reason(mask, error)
    return Record(name, str(image), str(mask), problems=problems, **found)


def _reason(file: Any, error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"Cannot read {file} as a picture ({error})."


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


def _of_mask(path: Path, reader: MaskReader, found: Mapping[str, Any], problems: dict[str, str]) -> dict[str, Any]:
    with Image.open(path) as file:
        size, kind = (file.height, file.width), file.format or ""
    known: dict[str, Any] = {"mask_size": size, "mask_format": kind}
    try:
        ids = reader.read(path)
    except UserError as error:
        try:
            known["raw"] = _raw(path, reader)
        except UserError:
            return known | _noted(problems, "unreadable_mask", error)
        return known | _noted(problems, "foreign_ids", error)
    known["mask_size"] = ids.shape
    image_size = found.get("image_size")
    if image_size is not None and ids.shape != image_size:
        reason = _misfit(ids.shape, image_size, reader.masks.on_size_mismatch)
        if reason:
            problems["size_mismatch"] = f"{path}: {reason}"
        else:
            ids = cv2.resize(ids, (image_size[1], image_size[0]), interpolation=cv2.INTER_NEAREST_EXACT)
    pixels = {int(value): int(count) for value, count in _counted(ids)}
    known |= {"pixels": pixels, "mask_digest": _digest(ids), "raw": _raw_of(path, reader, pixels)}
    return known | ({"borders": _borders(ids).tobytes()} if found["decoded"] else {})


def _noted(problems: dict[str, str], code: str, error: UserError) -> dict[str, Any]:
    problems[code] = str(error)
    return {}


def _misfit(mask: tuple[int, ...], image: tuple[int, int], rule: str) -> str:
    """Return why a mask of another size stops a run, or nothing where it is resized."""
    sizes = f"the mask is {mask[1]} x {mask[0]} (width x height), its image {image[1]} x {image[0]}"
    if rule == "error":
        return sizes
    proportions = (image[0] / mask[0]) / (image[1] / mask[1])
    return f"{sizes}: their proportions differ" if abs(proportions - 1) > _PROPORTIONS else ""


def _raw_of(path: Path, reader: MaskReader, pixels: Mapping[int, int]) -> dict[str, int]:
    """Return what the file holds; it is read again only where that differs from the class ids."""
    masks = reader.masks
    if masks.format == "palette" or (masks.format == "ids" and (masks.ids or masks.reduce_zero_label)):
        return _raw(path, reader)
    scale = 255 if masks.format == "binary" else 1
    return {str(value * scale): count for value, count in pixels.items()}


def _raw(path: Path, reader: MaskReader) -> dict[str, int]:
    numbers = read_image(path) if reader.masks.format == "palette" else read_ids(path)
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
        UserError: the file does not end as its kind does, and cannot be decoded either.
    """
    if not isinstance(image, str | Path):
        return None
    _refuse_cut(Path(image))
    with Image.open(image) as file:
        # asked of a PNG without one, Pillow would decode it all to look behind the pixels
        turned = "exif" in file.info and file.getexif().get(_ORIENTATION) in _TURNED
        return (file.width, file.height) if turned else (file.height, file.width)


def _refuse_cut(path: Path) -> None:
    """Decode a PNG or JPEG file that lacks its end mark, which most truncated files do: the others cost one seek."""
    with path.open("rb") as file:
        start = file.read(8)
        mark = next((mark for magic, mark in _ENDS.items() if start.startswith(magic)), b"")
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        if mark not in file.read():
            read_image(path)
