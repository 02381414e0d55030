"""Measurement of an image and its mask in a single read; imports no torch."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from dinoseg.core.sources import (
    ImageSource,
    Layers,
    MaskPage,
    MaskSource,
    mask_file,
    read_peaks,
    read_source,
    stated_size,
)
from dinoseg.data.classes.masks import MaskReader, check_fit, fit_mask
from dinoseg.data.pairs.pair import Pair, ignore_invalid
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_regular, open_regular
from dinoseg.utils.images import read_ids, read_image, read_size
from dinoseg.utils.levels import to_display

SMALL = 64  # rows and columns of the small copies
_HASHED, _LOWEST = 32, 8  # the perceptual hash covers the 8 x 8 lowest frequencies of 32 x 32 pixels
_FLAT = 2.0  # grey-level standard deviation below which an image has no hash: it would be noise
_MAX_RAW = 256  # most file values that are listed
_JPEG = b"\xff\xd8"  # magic bytes
_ENDS = {b"\x89PNG": b"IEND", _JPEG: b"\xff\xd9"}  # magic bytes to end mark
_TAIL = 4096  # bytes that are searched for an end mark: cameras append data of their own


@dataclass(frozen=True)
class Record:
    """Measurements of one pair.

    Args:
        name: name of the pair.
        image: path of the image file, as text.
        mask: path of the mask file, as text.
        image_size: height and width, None if unknown.
        mask_size: height and width in the file, None if unknown.
        pixels: class id or ignore_index to number of pixels, as used in training; empty for a rejected mask.
        raw: number or colour in the mask file to number of pixels; at most 256 entries. Of layers: class and value.
        peaks: highest level of each channel of an image of 16 bits whose range is not declared, 0 of channels of 8
            bits; empty if unknown.
        problems: code to reason, of all problems that would stop a run.
        overlap: pixels of several classes; 0 unless the mask has layers.
        mask_digest: hash of the ids.
        decoded: whether the image was decoded; the fields below need it.
        image_digest: hash of the pixels.
        look: 64-bit perceptual hash (DCT), None for a flat image.
        edges: (64 * 64,) uint8, rank of the colour gradient of a small copy.
        borders: (64 * 64 / 8,) uint8, bits that mark borders in a small copy of the mask.
    """

    name: str
    image: str
    mask: str
    image_size: tuple[int, int] | None = None
    mask_size: tuple[int, int] | None = None
    pixels: Mapping[int, int] = field(default_factory=dict)
    raw: Mapping[str, int] = field(default_factory=dict)
    peaks: tuple[int, ...] = ()
    problems: Mapping[str, str] = field(default_factory=dict)
    overlap: int = 0
    mask_digest: str = ""
    decoded: bool = False
    image_digest: str = ""
    look: int | None = None
    edges: bytes = b""
    borders: bytes = b""

    @property
    def counts(self) -> np.ndarray:
        """Number of pixels (256,) int64 of each class id, including ignore_index."""
        counts = np.zeros(256, dtype=np.int64)
        counts[list(self.pixels)] = list(self.pixels.values())
        return counts

    def with_problem(self, code: str, reason: str) -> "Record":
        """Return a copy of the record with one more problem."""
        return replace(self, problems={**self.problems, code: reason})


def measure(pair: Pair, reader: MaskReader, *, images: bool) -> Record:
    """Measure one pair; a file that cannot be read becomes a problem in the record, never an error.

    Args:
        pair: an image file or video frame, and its mask.
        reader: reader of the masks.
        images: decode the image too; otherwise read only its header and its end, which detects most truncated files.
    """
    record = Record(pair.name, str(pair.image), str(pair.mask), decoded=images)
    image, mask = pair.image, pair.mask
    try:
        if images:
            pixels = read_source(image)
            record = replace(_with_pixels(record, pixels), peaks=read_peaks(image, pixels))
        else:
            record = replace(record, image_size=_header_size(image))
    except Exception as error:  # a decoder may raise anything on a damaged file
        record = record.with_problem("unreadable_image", _explain(image, error))
    try:
        if stated_size(mask) is None and _is_jpeg(mask_file(mask)):
            reason = f"{mask} is a JPEG file, which changes the ids near borders. Save it as PNG."
            record = record.with_problem("mask_is_jpeg", reason)
        return _with_ids(record, mask, image, reader)
    except Exception as error:
        return record.with_problem("unreadable_mask", _explain(mask, error))


def measure_sample(name: str, where: str, read: Callable[[], Mapping[str, Any]], ignore_index: int) -> Record:
    """Return the record of a sample that a dataset reads itself; any error becomes a problem in the record.

    Args:
        name: name of the sample.
        where: stands for the paths of its files.
        read: returns the sample, whose mask holds only class ids, or layers of 0 and 1, and ignore_index.
        ignore_index: the ignored id.
    """
    record = Record(name, where, where, decoded=True)
    try:
        sample = read()
    except Exception as error:  # user code may raise anything
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return record.with_problem("unreadable_image", reason)
    ids = np.ascontiguousarray(sample["mask"].numpy())
    record = _with_pixels(record, sample["image"].permute(1, 2, 0).numpy())
    record = _with_mask(replace(record, mask_size=(ids.shape[-2], ids.shape[-1])), ids, ignore_index)
    return record if ids.ndim > 2 else replace(record, raw=_name_counts(record.pixels))


def _with_pixels(record: Record, image: np.ndarray) -> Record:
    pixels = np.ascontiguousarray(image)
    shown = to_display(pixels)
    return replace(
        record,
        image_size=(pixels.shape[0], pixels.shape[1]),
        image_digest=digest(pixels),
        look=perceptual_hash(shown),
        edges=edges(shown).tobytes(),
    )


def _header_size(image: ImageSource) -> tuple[int, int] | None:
    """Return height and width as `read_source` would, without decoding; None for a video frame.

    Raises:
        UserError: the file is not an image, or ends too early and cannot be decoded either.
    """
    if not isinstance(image, Path):
        return image.size()
    check_regular(image)
    if ends_early(image):
        read_image(image)  # some writers omit the end mark: an image that decodes completely is valid
    return read_size(image)


def _is_jpeg(path: Path) -> bool:
    with open_regular(path) as file:
        return file.read(len(_JPEG)) == _JPEG


def _with_ids(record: Record, mask: MaskSource, image: ImageSource, reader: MaskReader) -> Record:
    rule = reader.masks.on_size_mismatch
    if (drawn := stated_size(mask)) is not None:
        record = _with_drawn_size(record, drawn, rule, image=image, mask=mask)
        if record.problems:  # of the image: nothing bounds the size of the mask
            return record
    try:
        ids = reader.read(mask)
    except UserError as error:
        if not isinstance(mask, Path):
            raise
        return replace(record, raw=_read_raw(mask, reader)).with_problem("foreign_ids", str(error))
    record = replace(record, mask_size=(ids.shape[-2], ids.shape[-1]))
    try:
        ids = fit_mask(ids, record.image_size or ids.shape, rule, image=image, path=mask)
    except UserError as error:
        record = record.with_problem("size_mismatch", str(error))
    record = replace(
        record, raw=_layer_values(ids, mask) if isinstance(mask, Layers) else _count_raw(mask, reader, ids)
    )
    ignored = reader.labels.ignore_index
    if not record.problems:
        ids = ignore_invalid(ids, image, ignored, rule=rule, path=mask)
    return _with_mask(record, ids, ignored)


def _with_drawn_size(
    record: Record, size: tuple[int, int], rule: str, *, image: ImageSource, mask: MaskSource
) -> Record:
    """Return a record with the size (H, W) that an annotation file states, before its mask is drawn."""
    record = replace(record, mask_size=size)
    try:
        check_fit(size, record.image_size or size, rule, image=image, path=mask)
    except UserError as error:
        return record if record.problems else record.with_problem("size_mismatch", str(error))
    return record


def _with_mask(record: Record, mask: np.ndarray, ignore_index: int) -> Record:
    """Return a record with the measurements of ids (H, W) or of layers (K, H, W)."""
    if mask.ndim > 2:
        several = (mask == 1).sum(axis=0) > 1
        record = replace(record, pixels=_layer_counts(mask, ignore_index), overlap=int(several.sum()))
    else:
        record = replace(record, pixels=dict(_count_values(mask)))
    small = borders(mask.max(axis=0) if mask.ndim > 2 else mask).tobytes() if record.decoded else b""
    return replace(record, mask_digest=digest(mask), borders=small)


def _layer_counts(layers: np.ndarray, ignore_index: int) -> dict[int, int]:
    """Return the pixels of each class that layers (K, H, W) show, and the ignored ones of all layers."""
    counts = dict(enumerate((layers == 1).sum(axis=(1, 2)).tolist()))
    counts[ignore_index] = int((layers == ignore_index).sum())
    return {value: count for value, count in counts.items() if count}


def _layer_values(layers: np.ndarray, mask: Layers) -> dict[str, int]:
    """Return the pixels of each value in the files of layers (K, H, W), with keys such as `1: 255` for class 1."""
    files = [index for index, source in enumerate(mask.sources) if isinstance(source, Path | MaskPage)]
    return {f"{index}: {value}": count for index in files for value, count in _count_values(layers[index])}


def _count_raw(mask: MaskSource, reader: MaskReader, ids: np.ndarray) -> dict[str, int]:
    """Return the value counts of a mask file, which is read again only if its values differ from the class ids."""
    masks = reader.masks
    is_mapped = masks.format == "ids" and (masks.ids or masks.others or masks.reduce_zero_label)
    if isinstance(mask, Path) and (is_mapped or masks.format == "palette"):
        return _read_raw(mask, reader)
    scale = 255 if isinstance(mask, Path) and masks.format == "binary" else 1
    return _name_counts({value * scale: count for value, count in _count_values(ids)})


def _name_counts(pixels: Mapping[int, int]) -> dict[str, int]:
    return {str(value): count for value, count in pixels.items()}


def _read_raw(path: Path, reader: MaskReader) -> dict[str, int]:
    numbers = read_image(path) if reader.masks.format == "palette" else read_ids(path)
    if numbers.ndim == 3 and reader.masks.format != "palette" and (numbers == numbers[..., :1]).all():
        numbers = numbers[..., 0]
    if numbers.ndim == 2:
        return _name_counts(dict(_count_values(numbers)[:_MAX_RAW]))
    codes = numbers[..., 0].astype(np.int32) << 16 | numbers[..., 1].astype(np.int32) << 8 | numbers[..., 2]
    common = sorted(_count_values(codes), key=lambda pair: -pair[1])[:_MAX_RAW]
    return {f"({code >> 16}, {code >> 8 & 255}, {code & 255})": count for code, count in common}


def _count_values(values: np.ndarray) -> list[tuple[int, int]]:
    if values.dtype == np.uint8:  # several times faster than sorting, and lets other threads run
        return [pair for pair in enumerate(Image.fromarray(values).histogram()) if pair[1]]
    return list(zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True))


def _explain(file: object, error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"Cannot read {file} ({error.strerror}). Check the path and its disk."
    return f"Cannot read {file} as an image ({error})."


def ends_early(path: Path) -> bool:
    """Return whether a PNG or JPEG file lacks its end mark, as most truncated files do; costs two short reads."""
    with path.open("rb") as file:
        start = file.read(8)
        mark = next((mark for magic, mark in _ENDS.items() if start.startswith(magic)), None)
        if mark is None:
            return False
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        return mark not in file.read()


def digest(pixels: np.ndarray) -> str:
    """Return a hash of all pixels and of the shape."""
    whole = hashlib.blake2b(str(pixels.shape).encode(), digest_size=16)
    whole.update(np.ascontiguousarray(pixels).data)
    return whole.hexdigest()


# imagehash's phash finds the same copies in 3.5 times the time, and hashes the noise of a flat image
def perceptual_hash(pixels: np.ndarray) -> int | None:
    """Return 64 bits: which low frequencies of an image (H, W, 3) are above their median; None if it is flat."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_HASHED, _HASHED), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.std() < _FLAT:
        return None
    waves = cv2.dct(small)[:_LOWEST, :_LOWEST].ravel()
    bits = waves > np.median(waves[1:])  # the first is the mean level
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def edges(pixels: np.ndarray) -> np.ndarray:
    """Return the gradient rank (64 * 64,) uint8 of each pixel in a small copy of an image (H, W, 3).

    Ranks are robust to differences in exposure and contrast.
    """
    small = cv2.resize(pixels, (SMALL, SMALL), interpolation=cv2.INTER_AREA).astype(np.float32)
    across, down = cv2.Sobel(small, cv2.CV_32F, 1, 0), cv2.Sobel(small, cv2.CV_32F, 0, 1)
    steepness = np.hypot(across, down).max(axis=-1).ravel()  # (64 * 64,)
    ordered = np.sort(steepness)
    rank = np.searchsorted(ordered, steepness, "left") + np.searchsorted(ordered, steepness, "right")
    return (rank * (255 / (2 * rank.size))).astype(np.uint8)


def borders(ids: np.ndarray) -> np.ndarray:
    """Return bits (64 * 64 / 8,) uint8 that mark border pixels in a small copy of class ids (H, W)."""
    small = cv2.resize(ids, (SMALL, SMALL), interpolation=cv2.INTER_NEAREST_EXACT)
    on_border = np.zeros((SMALL, SMALL), dtype=bool)
    across, down = small[:, 1:] != small[:, :-1], small[1:] != small[:-1]
    on_border[:, 1:] |= across
    on_border[:, :-1] |= across
    on_border[1:] |= down
    on_border[:-1] |= down
    return np.packbits(on_border)
