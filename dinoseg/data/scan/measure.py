"""Measurement of an image and its mask in a single read; imports no torch."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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

_MAX_RAW = 256  # most file values that are listed
_JPEG = b"\xff\xd8"  # magic bytes
_ENDS = {b"\x89PNG": b"IEND", _JPEG: b"\xff\xd9"}  # magic bytes to end mark
_TAIL = 4096  # bytes that are searched for an end mark: cameras append data of their own


@dataclass(frozen=True)
class Details:
    """Further measurements for a caller of `scan`, as JSON values by name; records store them.

    Args:
        of_image: measures the pixels (H, W, C) of a decoded image, uint8 or uint16.
        of_mask: measures class ids (H, W) or layers (K, H, W), as used in training.
    """

    of_image: Callable[[np.ndarray], Mapping[str, Any]]
    of_mask: Callable[[np.ndarray], Mapping[str, Any]]


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
        decoded: whether the image was decoded, as `image_digest` needs.
        image_digest: hash of the pixels.
        details: measurements of `Details`; of an image or mask that cannot be read, those of the other alone.
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
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> np.ndarray:
        """Number of pixels (256,) int64 of each class id, including ignore_index."""
        counts = np.zeros(256, dtype=np.int64)
        counts[list(self.pixels)] = list(self.pixels.values())
        return counts

    def with_problem(self, code: str, reason: str) -> "Record":
        """Return a copy of the record with one more problem."""
        return replace(self, problems={**self.problems, code: reason})


def measure(pair: Pair, reader: MaskReader, *, images: bool, details: Details | None = None) -> Record:
    """Measure one pair; a file that cannot be read becomes a problem in the record, never an error.

    Args:
        pair: an image file or video frame, and its mask.
        reader: reader of the masks.
        images: decode the image too; otherwise read only its header and its end, which detects most truncated files.
        details: what else to measure; needs `images`.
    """
    record = Record(pair.name, str(pair.image), str(pair.mask), decoded=images)
    image, mask = pair.image, pair.mask
    try:
        if images:
            pixels = read_source(image)
            record = replace(_with_pixels(record, pixels, details), peaks=read_peaks(image, pixels))
        else:
            record = replace(record, image_size=_header_size(image))
    except Exception as error:  # a decoder may raise anything on a damaged file
        record = record.with_problem("unreadable_image", _explain(image, error))
    try:
        if stated_size(mask) is None and _is_jpeg(mask_file(mask)):
            reason = f"{mask} is a JPEG file, which changes the ids near borders. Save it as PNG."
            record = record.with_problem("mask_is_jpeg", reason)
        return _with_ids(record, mask, image, reader, details)
    except Exception as error:
        return record.with_problem("unreadable_mask", _explain(mask, error))


def measure_sample(
    name: str, where: str, read: Callable[[], Mapping[str, Any]], ignore_index: int, details: Details | None = None
) -> Record:
    """Return the record of a sample that a dataset reads itself; any error becomes a problem in the record.

    Args:
        name: name of the sample.
        where: stands for the paths of its files.
        read: returns the sample, whose mask holds only class ids, or layers of 0 and 1, and ignore_index.
        ignore_index: the ignored id.
        details: what else to measure.
    """
    record = Record(name, where, where, decoded=True)
    try:
        sample = read()
    except Exception as error:  # user code may raise anything
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return record.with_problem("unreadable_image", reason)
    ids = np.ascontiguousarray(sample["mask"].numpy())
    record = _with_pixels(record, sample["image"].permute(1, 2, 0).numpy(), details)
    record = _with_mask(replace(record, mask_size=(ids.shape[-2], ids.shape[-1])), ids, ignore_index, details)
    return record if ids.ndim > 2 else replace(record, raw=_name_counts(record.pixels))


def _with_pixels(record: Record, image: np.ndarray, details: Details | None) -> Record:
    pixels = np.ascontiguousarray(image)
    found = {} if details is None else details.of_image(pixels)
    size = (pixels.shape[0], pixels.shape[1])
    return replace(record, image_size=size, image_digest=digest(pixels), details=found)


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


def _with_ids(
    record: Record, mask: MaskSource, image: ImageSource, reader: MaskReader, details: Details | None
) -> Record:
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
    return _with_mask(record, ids, ignored, details)


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


def _with_mask(record: Record, mask: np.ndarray, ignore_index: int, details: Details | None) -> Record:
    """Return a record with the measurements of ids (H, W) or of layers (K, H, W)."""
    if mask.ndim > 2:
        several = (mask == 1).sum(axis=0) > 1
        record = replace(record, pixels=_layer_counts(mask, ignore_index), overlap=int(several.sum()))
    else:
        record = replace(record, pixels=dict(_count_values(mask)))
    if details is not None:
        record = replace(record, details={**record.details, **details.of_mask(mask)})
    return replace(record, mask_digest=digest(mask))


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
