"""Pixels per class over all masks of a dataset, cached in a file."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dinoseg.core.shapes import SegmentationData
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.scan.record import Record
from dinoseg.data.scan.scan import scan
from dinoseg.report.progress import Bar
from dinoseg.utils import forms
from dinoseg.utils.atomic import write_text
from dinoseg.utils.errors import UserError
from dinoseg.utils.units import finished

log = logging.getLogger(__name__)
_FORM = forms.record(fingerprint=forms.text, classes=forms.listing(forms.text), pixels=forms.listing(forms.whole()))


def class_counts(dataset: SegmentationData, cache_dir: str | Path) -> np.ndarray:
    """Return the number of pixels (K,) int64 of each class; ignored pixels do not count.

    The counts are cached in `cache_dir` under the dataset's `fingerprint()`, so a changed file, name or class triggers
    a recount. Datasets other than `PairDataset` are counted on every call.

    Raises:
        UserError: a mask is unreadable or holds a value without class.
    """
    if not isinstance(dataset, PairDataset):
        return _count(dataset)
    files = dataset.source  # the masks of a packed dataset may be reduced
    key = files.fingerprint()
    counts = _load(_path(key, cache_dir), key, len(files.classes))
    if counts is None:
        counts = cache_counts(files, scan(files.pairs, files.reader, images=False, cache_dir=cache_dir), key, cache_dir)
    return counts


def cache_counts(files: PairDataset, records: Sequence[Record], key: str, cache_dir: str | Path) -> np.ndarray:
    """Return the counts (K,) from the records of a scan of all masks, and cache them for `class_counts`.

    Args:
        files: the dataset of the files.
        records: records of its pairs.
        key: its fingerprint, taken before the files were read.
        cache_dir: folder of the cached counts.

    Raises:
        UserError: a mask is unreadable or holds a value without class.
    """
    for record in records:
        if record.problems and not record.pixels:
            raise UserError("; ".join(record.problems.values()))
    pixels = sum((record.counts for record in records), np.zeros(256, dtype=np.int64))
    counts = _of_classes(pixels, len(files.classes), files.ignore_index)
    _save(_path(key, cache_dir), {"fingerprint": key, "classes": list(files.classes), "pixels": counts.tolist()})
    return counts


def _count(dataset: SegmentationData) -> np.ndarray:
    pixels = np.zeros(256, dtype=np.int64)
    for index in Bar(range(len(dataset)), desc="counting classes", unit="mask", delay=2, leave=False):
        pixels += np.bincount(dataset[index]["mask"].numpy().ravel(), minlength=256)
    return _of_classes(pixels, len(dataset.classes), dataset.ignore_index)


def _of_classes(pixels: np.ndarray, num_classes: int, ignore_index: int) -> np.ndarray:
    """Return the pixels (K,) of the classes, with 0 for an ignored class."""
    pixels[ignore_index] = 0
    return pixels[:num_classes]


def _path(key: str, cache_dir: str | Path) -> Path:
    return Path(cache_dir) / f"class_counts_{key[:16]}.json"


def _load(path: Path, key: str, num_classes: int) -> np.ndarray | None:
    record = finished(
        path,
        lambda path: forms.read_json(path, _FORM),
        lambda record: record["fingerprint"] == key and len(record["pixels"]) == num_classes,
        damaged="The stored class counts in %s are damaged (%s): counting again.",
    )
    return None if record is None else np.array(record["pixels"], dtype=np.int64)


def _save(path: Path, content: dict) -> None:
    try:
        write_text(path, json.dumps(content))
    except OSError as error:
        log.warning("Cannot store the class counts in %s (%s): the next run counts again.", path, error)
