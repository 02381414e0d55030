"""Pixels per class over all masks of a data set: counted once, then kept in a file."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.report.progress import Bar
from dinoseg.shapes import SegmentationData
from dinoseg.storage import forms
from dinoseg.storage.atomic import write_text
from dinoseg.storage.units import finished

log = logging.getLogger(__name__)
_FORM = forms.record(fingerprint=forms.text, classes=forms.listing(forms.text), pixels=forms.listing(forms.whole()))


def class_counts(dataset: SegmentationData, cache_dir: str | Path) -> np.ndarray:
    """Return how many pixels (K,) int64 each class has; ignored pixels do not count.

    The counts are kept in `cache_dir` under the data set's `fingerprint()`, so a changed file, name or class
    is counted anew; a data set that is no pairs of files is counted every time.

    Raises:
        UserError: a mask is unreadable or holds what is no class.
    """
    if not isinstance(dataset, PairDataset):
        return _count(dataset, lambda index: dataset[index]["mask"].numpy())
    files = dataset.source  # the masks of a packed data set may be reduced
    key = files.fingerprint()
    path = Path(cache_dir) / f"class_counts_{key[:16]}.json"
    counts = _load(path, key, len(files.classes))
    if counts is None:
        counts = _count(files, files.mask)
        _save(path, {"fingerprint": key, "classes": list(files.classes), "pixels": counts.tolist()})
    return counts


def _count(dataset: SegmentationData, read_mask: Callable[[int], np.ndarray]) -> np.ndarray:
    pixels = np.zeros(256, dtype=np.int64)
    bar = Bar(range(len(dataset)), desc="counting classes", unit="mask", delay=2, leave=False)
    for index in bar:
        pixels += np.bincount(read_mask(index).ravel(), minlength=256)
    pixels[dataset.ignore_index] = 0
    return pixels[: len(dataset.classes)]


def _load(path: Path, key: str, num_classes: int) -> np.ndarray | None:
    record = finished(
        path,
        lambda path: forms.read_json(path, _FORM),
        lambda record: record["fingerprint"] == key and len(record["pixels"]) == num_classes,
        damaged="The kept class counts in %s are damaged (%s): counting anew.",
    )
    return None if record is None else np.array(record["pixels"], dtype=np.int64)


def _save(path: Path, content: dict) -> None:
    try:
        write_text(path, json.dumps(content))
    except OSError as error:
        log.warning("The class counts cannot be kept in %s (%s): the next run counts anew.", path, error)
