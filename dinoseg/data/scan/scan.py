"""Measurement of all pairs of a dataset by several threads, stored between runs, and the pixels of each class."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.core.shapes import SegmentationData
from dinoseg.core.sources import mask_file, mask_key, reading_rule
from dinoseg.data.classes.masks import MaskReader
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.scan.measure import Details, Record, measure
from dinoseg.report.progress import Bar
from dinoseg.utils.atomic import create_cache_dir, write_text
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import stamp
from dinoseg.utils.forms import read_regular

log = logging.getLogger(__name__)

StoredRecords = dict[str, tuple[list[int] | None, Record]]  # key of a pair to the stamps of its files, and its record
_CHUNK = 16  # successive pairs that a thread measures: frames of a video are decoded in their order
_VERSION = 10  # version of the record format
_UNREADABLE = {"unreadable_image", "unreadable_mask"}
_SIZES = ("image_size", "mask_size")


def scan(
    pairs: Sequence[Pair],
    reader: MaskReader,
    *,
    images: bool = True,
    details: Details | None = None,
    workers: int = 1,
    cache_dir: str | Path | None = None,
) -> list[Record]:
    """Return the record of each pair, in order; a bad file becomes a problem in its record, never an error.

    Args:
        pairs: what to read.
        reader: reader of the masks.
        images: decode the images too; without it, their hashes are unknown.
        details: what else to measure of images and masks, in the same read; needs `images`.
        workers: number of reading threads.
        cache_dir: folder of the stored records, so that only changed files are read again; None: all files are read.
    """
    path = None if cache_dir is None else _find_file(Path(cache_dir).expanduser(), pairs, reader)
    stored = {} if path is None else _read_records(path)
    keys = [_key(pair) for pair in pairs]
    stamps = [_stamps(pair) for pair in pairs]  # before reading: a file that changes meanwhile is read again
    records: dict[int, Record] = {}
    for index, pair in enumerate(pairs):
        stored_stamps, record = stored.get(keys[index], (None, None))
        if record is None or stored_stamps != stamps[index]:
            continue
        if (record.decoded or not images) and (record.details or details is None):
            records[index] = replace(record, name=pair.name)
    missing = [index for index in range(len(pairs)) if index not in records]
    new: StoredRecords = {}
    try:
        measure_pair = partial(measure, reader=reader, images=images, details=details)
        measured = _measure_all([pairs[index] for index in missing], measure_pair, workers)
        for index, record in zip(missing, measured, strict=True):
            records[index] = record
            # the machine may be the cause of unreadable files
            if stamps[index] is not None and not record.problems.keys() & _UNREADABLE:
                new[keys[index]] = (stamps[index], record)
    finally:  # also after an interruption: the next run resumes from here
        if path is not None and new:
            _write_records(path, stored | new)
    return [records[index] for index in range(len(pairs))]


def unreadable(records: Iterable[Record]) -> dict[str, str]:
    """Return name to reason of the pairs that would stop a run when they are read."""
    return {record.name: "; ".join(record.problems.values()) for record in records if record.problems}


def class_counts(dataset: SegmentationData, cache_dir: str | Path) -> np.ndarray:
    """Return the number of pixels (K,) int64 of each class; ignored pixels do not count.

    Masks that are scanned already, by the check before a training or by an earlier run, are taken from the cached
    records in `cache_dir`. Datasets other than `PairDataset` are counted on every call.

    Raises:
        UserError: a mask is unreadable or holds a value without class.
    """
    if not isinstance(dataset, PairDataset):
        return _count_samples(dataset)
    files = dataset.source  # the masks of a packed dataset may be reduced
    records = scan(files.pairs, files.reader, images=False, cache_dir=cache_dir)
    for record in records:
        if record.problems and not record.pixels:
            raise UserError("; ".join(record.problems.values()))
    pixels = sum((record.counts for record in records), np.zeros(256, dtype=np.int64))
    return _counts_of_classes(pixels, len(files.classes), files.ignore_index)


def _measure_all(pairs: Sequence[Pair], measure_pair: Callable[[Pair], Record], workers: int) -> Iterator[Record]:
    """Yield the records in order, with a progress bar; decoders release Python's lock, so that threads suffice."""

    def measure_chunk(start: int) -> list[Record]:
        return [measure_pair(pair) for pair in pairs[start : start + _CHUNK]]

    with Bar(total=len(pairs), desc="scanning", unit="pair", delay=2, leave=False) as bar:
        pool = ThreadPoolExecutor(workers)
        try:
            for records in pool.map(measure_chunk, range(0, len(pairs), _CHUNK)):
                yield from records
                bar.update(len(records))
        finally:
            pool.shutdown(cancel_futures=True)


def _find_file(folder: Path, pairs: Sequence[Pair], reader: MaskReader) -> Path:
    """Return the file with the records of all masks below one folder under one set of mask rules."""
    common = os.path.commonpath([os.path.abspath(mask_file(pair.mask)) for pair in pairs]) if pairs else ""
    key = hashlib.sha256(repr((_VERSION, common, reader.rules())).encode()).hexdigest()
    return folder / f"scan_{key[:16]}.json"


def _read_records(path: Path) -> StoredRecords:
    try:
        rows = json.loads(read_regular(path))
        return {key: (row["stamps"], _from_json(row["record"])) for key, row in rows.items()}
    except FileNotFoundError:
        return {}
    except Exception as error:  # damaged content may fail anywhere, and is only measured again
        log.warning("The stored scan in %s is damaged (%s): scanning again.", path, error)
        return {}


def _write_records(path: Path, records: StoredRecords) -> None:
    """Write the records atomically; if that fails, the next run only has to scan again."""
    rows = {key: {"stamps": stamps, "record": vars(record)} for key, (stamps, record) in records.items()}
    try:
        create_cache_dir(path.parent)
        write_text(path, json.dumps(rows))
    except OSError as error:
        log.warning("Cannot store the scan in %s (%s): the next run scans again.", path, error)


def _from_json(row: Mapping[str, Any]) -> Record:
    counts = {"pixels": {int(value): int(count) for value, count in row["pixels"].items()}}
    counts |= {"raw": {value: int(count) for value, count in row["raw"].items()}}
    sizes = {name: row[name] and tuple(row[name]) for name in _SIZES}
    maps = {name: {**row[name]} for name in ("problems", "details")}
    return Record(**{**row, **sizes, **counts, **maps, "peaks": tuple(row["peaks"])})


def _key(pair: Pair) -> str:
    if isinstance(pair.image, Path):
        source = os.path.abspath(pair.image)
    else:
        source = f"{os.path.abspath(pair.image.path)}\0{reading_rule(pair.image)}"
    return f"{source}\0{mask_key(pair.mask)}"


def _stamps(pair: Pair) -> list[int] | None:
    of_image, of_mask = stamp(pair.image), stamp(pair.mask)
    return None if of_image is None or of_mask is None else [*of_image, *of_mask]


def _count_samples(dataset: SegmentationData) -> np.ndarray:
    pixels = np.zeros(256, dtype=np.int64)
    for index in Bar(range(len(dataset)), desc="counting classes", unit="mask", delay=2, leave=False):
        mask = dataset[index]["mask"].numpy()
        if mask.ndim > 2:  # layers
            pixels[: len(mask)] += (mask == 1).sum(axis=(1, 2))
        else:
            pixels += np.bincount(mask.ravel(), minlength=256)
    return _counts_of_classes(pixels, len(dataset.classes), dataset.ignore_index)


def _counts_of_classes(pixels: np.ndarray, num_classes: int, ignore_index: int) -> np.ndarray:
    """Return the pixels (K,) of the classes, with 0 for an ignored class."""
    pixels[ignore_index] = 0
    return pixels[:num_classes]
