"""Pixels per class over all masks of a dataset."""

from pathlib import Path

import numpy as np

from dinoseg.core.shapes import SegmentationData
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.scan.scan import scan
from dinoseg.report.progress import Bar
from dinoseg.utils.errors import UserError


def class_counts(dataset: SegmentationData, cache_dir: str | Path) -> np.ndarray:
    """Return the number of pixels (K,) int64 of each class; ignored pixels do not count.

    Masks that are scanned already, by the check before a training or by an earlier run, are taken from the cached
    records in `cache_dir`. Datasets other than `PairDataset` are counted on every call.

    Raises:
        UserError: a mask is unreadable or holds a value without class.
    """
    if not isinstance(dataset, PairDataset):
        return _count(dataset)
    files = dataset.source  # the masks of a packed dataset may be reduced
    records = scan(files.pairs, files.reader, images=False, cache_dir=cache_dir)
    for record in records:
        if record.problems and not record.pixels:
            raise UserError("; ".join(record.problems.values()))
    pixels = sum((record.counts for record in records), np.zeros(256, dtype=np.int64))
    return _of_classes(pixels, len(files.classes), files.ignore_index)


def _count(dataset: SegmentationData) -> np.ndarray:
    pixels = np.zeros(256, dtype=np.int64)
    for index in Bar(range(len(dataset)), desc="counting classes", unit="mask", delay=2, leave=False):
        mask = dataset[index]["mask"].numpy()
        if mask.ndim > 2:  # layers
            pixels[: len(mask)] += (mask == 1).sum(axis=(1, 2))
        else:
            pixels += np.bincount(mask.ravel(), minlength=256)
    return _of_classes(pixels, len(dataset.classes), dataset.ignore_index)


def _of_classes(pixels: np.ndarray, num_classes: int, ignore_index: int) -> np.ndarray:
    """Return the pixels (K,) of the classes, with 0 for an ignored class."""
    pixels[ignore_index] = 0
    return pixels[:num_classes]
