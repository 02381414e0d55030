"""Measurement of an image and its mask in a single read; imports no torch."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL.TiffImagePlugin import TiffImageFile

from dinoseg.data.annotation.drawing import Drawing, MaskSource
from dinoseg.data.classes.mask_size import fit_mask
from dinoseg.data.classes.masks import MaskReader
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.scan.likeness import borders, digest, edges, perceptual_hash
from dinoseg.data.scan.record import Record
from dinoseg.data.video.access import ImageSource, read_source
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import check_regular
from dinoseg.utils.images import open_image, read_ids, read_image, read_size

_MAX_RAW = 256  # most file values that are listed
_LOSSY = ("JPEG", "MPO")


def measure(pair: Pair, reader: MaskReader, *, images: bool) -> Record:
    """Measure one pair; a file that cannot be read becomes a problem in the record, never an error.

    Args:
        pair: an image file or video frame, and its mask.
        reader: reader of the masks.
        images: decode the image too; otherwise read only its header and its end, which detects most truncated files.
    """
    record, image, mask = Record(pair.name, str(pair.image), str(pair.mask), decoded=images), pair.image, pair.mask
    try:
        record = _with_pixels(record, read_source(image)) if images else replace(record, image_size=_header_size(image))
    except Exception as error:  # a decoder may raise anything on a damaged file
        record = record.with_problem("unreadable_image", _reason(image, error), passing=_may_pass(error))
    try:
        record = record if isinstance(mask, Drawing) else _with_mask_header(record, mask)
        return _with_ids(record, mask, image, reader)
    except Exception as error:
        return record.with_problem("unreadable_mask", _reason(mask, error), passing=_may_pass(error))


def measure_sample(name: str, where: str, read: Callable[[], Mapping[str, Any]]) -> Record:
    """Return the record of a sample that a dataset reads itself; any error becomes a problem in the record.

    Args:
        name: name of the sample.
        where: stands for the paths of its files.
        read: returns the sample, whose mask holds only class ids and ignore_index.
    """
    record = Record(name, where, where, decoded=True)
    try:
        sample = read()
    except Exception as error:  # user code may raise anything
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return record.with_problem("unreadable_image", reason, passing=_may_pass(error))
    ids = np.ascontiguousarray(sample["mask"].numpy())
    pixels = dict(_counted(ids))
    return replace(
        _with_pixels(record, sample["image"].permute(1, 2, 0).numpy()),
        mask_size=(ids.shape[0], ids.shape[1]),
        pixels=pixels,
        raw={str(value): count for value, count in pixels.items()},
        mask_digest=digest(ids),
        borders=borders(ids).tobytes(),
    )


def _with_pixels(record: Record, image: np.ndarray) -> Record:
    pixels = np.ascontiguousarray(image)
    levels = np.arange(256, dtype=np.int64)
    histograms = [np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)]
    return replace(
        record,
        image_size=(pixels.shape[0], pixels.shape[1]),
        image_digest=digest(pixels),
        look=perceptual_hash(pixels),
        color_sums=tuple(int(histogram @ levels) for histogram in histograms),
        color_squares=tuple(int(histogram @ levels**2) for histogram in histograms),
        edges=edges(pixels).tobytes(),
    )


def _header_size(image: ImageSource) -> tuple[int, int] | None:
    """Return height and width as `read_image` would, without decoding; None for a video frame.

    Raises:
        UserError: the file is not an image, or ends too early and cannot be decoded either.
    """
    if not isinstance(image, Path):
        return None
    check_regular(image)
    if ends_early(image):
        read_image(image)  # some writers omit the end mark: an image that decodes completely is valid
    return read_size(image)


def _with_mask_header(record: Record, mask: Path) -> Record:
    with open_image(mask) as file:
        record = replace(record, mask_size=(file.height, file.width), mask_format=file.format or "")
    if record.mask_format not in _LOSSY:
        return record
    reason = f"{mask} is a JPEG file, which changes the ids near borders. Save it as PNG."
    return record.with_problem("mask_is_jpeg", reason)


def _with_ids(record: Record, mask: MaskSource, image: ImageSource, reader: MaskReader) -> Record:
    try:
        ids = reader.read(mask)
    except UserError as error:
        if isinstance(mask, Drawing) or _may_pass(error):
            raise
        return replace(record, raw=_raw(mask, reader)).with_problem("foreign_ids", str(error))
    record = replace(record, mask_size=(ids.shape[0], ids.shape[1]))
    try:
        ids = fit_mask(ids, record.image_size or ids.shape, reader.masks.on_size_mismatch, image=image, path=mask)
    except UserError as error:
        record = record.with_problem("size_mismatch", str(error))
    pixels = dict(_counted(ids))
    return replace(
        record,
        pixels=pixels,
        mask_digest=digest(ids),
        raw=_raw_of(mask, reader, pixels),
        borders=borders(ids).tobytes() if record.decoded else b"",
    )


def _raw_of(mask: MaskSource, reader: MaskReader, pixels: Mapping[int, int]) -> dict[str, int]:
    """Return the value counts of the mask file, which is read again only if they differ from those of the class ids."""
    masks = reader.masks
    if isinstance(mask, Drawing):
        return {str(value): count for value, count in pixels.items()}
    if masks.format == "palette" or (masks.format == "ids" and (masks.ids or masks.others or masks.reduce_zero_label)):
        return _raw(mask, reader)
    scale = 255 if masks.format == "binary" else 1
    return {str(value * scale): count for value, count in pixels.items()}


def _raw(path: Path, reader: MaskReader) -> dict[str, int]:
    numbers = read_image(path) if reader.masks.format == "palette" else read_ids(path)
    if numbers.ndim == 3 and reader.masks.format != "palette" and (numbers == numbers[..., :1]).all():
        numbers = numbers[..., 0]
    if numbers.ndim == 2:
        return {str(value): count for value, count in _counted(numbers)[:_MAX_RAW]}
    codes = numbers[..., 0].astype(np.int32) << 16 | numbers[..., 1].astype(np.int32) << 8 | numbers[..., 2]
    common = sorted(_counted(codes), key=lambda pair: -pair[1])[:_MAX_RAW]
    return {f"({code >> 16}, {code >> 8 & 255}, {code & 255})": count for code, count in common}


def _counted(values: np.ndarray) -> list[tuple[int, int]]:
    if values.dtype == np.uint8:  # several times faster than sorting
        counts = np.bincount(values.ravel(), minlength=256)
        return [(int(value), int(counts[value])) for value in np.flatnonzero(counts)]
    return list(zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True))


def _reason(file: object, error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"Cannot read {file} ({error.strerror}). Check the path and its disk."
    return f"Cannot read {file} as an image ({error})."


def _may_pass(error: BaseException | None) -> bool:
    """Return whether an error may be transient: caused by the machine, such as a failed disk, not by the file."""
    while error is not None:
        of_the_system = isinstance(error, OSError) and error.errno is not None  # a decoder's own OSError has no errno
        out_of_memory = isinstance(error, cv2.error) and error.code == cv2.Error.StsNoMem
        if of_the_system or out_of_memory or isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


_ENDS = {b"\x89PNG": b"IEND", b"\xff\xd8": b"\xff\xd9"}  # magic bytes to end mark
_TAIL = 4096  # bytes that are searched for an end mark: cameras append data of their own
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # magic bytes, including BigTIFF
_STRIPS, _TILES = (273, 279), (324, 325)  # TIFF tags: offsets and byte counts of an image's parts


def ends_early(path: Path) -> bool:
    """Return whether a file lacks the end that its format or header declares, as most truncated files do.

    This costs two short reads; for TIFF files, those of the header.
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
    with open_image(path, ("TIFF",)) as file:
        if not isinstance(file, TiffImageFile):
            return 0
        tags = file.tag_v2
        parts = [zip(tags.get(begin, ()), tags.get(count, ()), strict=False) for begin, count in (_STRIPS, _TILES)]
        return max((begin + count for part in parts for begin, count in part), default=0)
