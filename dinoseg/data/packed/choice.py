"""Whether data is packed by itself: measured on a few of its images and on the disk, and told."""

import logging
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from dinoseg.data.packed.store import aligned
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.wording import in_bytes

log = logging.getLogger(__name__)

_TRIED = 5  # images
_LEAST_GAIN = 3.0  # times as fast, below which the room on the disk is worth more
_OF_FREE = 0.5  # share of what is free on the disk


def pays(dataset: PairDataset, split: str, cache_dir: Path) -> bool:
    """Return whether a data set is to be packed at full size, which changes no pixel of it; say why.

    Raises:
        UserError: an image or mask that is tried cannot be read.
    """
    files, packed, sizes = [], [], []
    try:
        for row in range(0, len(dataset), -(-len(dataset) // _TRIED)):
            start = time.perf_counter()
            sample = dataset[row]
            files.append(time.perf_counter() - start)
            item = np.concatenate([sample["image"].numpy().reshape(-1), sample["mask"].numpy().reshape(-1)])
            sizes.append(item.nbytes)
            packed.append(_seconds_on_disk(item, cache_dir))
        free = shutil.disk_usage(cache_dir).free
    except OSError as error:
        reason = f"nothing can be written to {cache_dir} ({error.strerror})"
        log.warning("data.cache=auto: split %s is read from its files, since %s.", split, reason)
        return False
    each, size = statistics.median(files), aligned(round(statistics.mean(sizes))) * len(dataset)
    gain = each / statistics.median(packed)
    if gain < _LEAST_GAIN:
        chosen = f"read from its files: packing pays from {_LEAST_GAIN:g} times as fast on"
    elif size > _OF_FREE * free:
        chosen = f"read from its files: at most {_OF_FREE:.0%} of the disk's free {in_bytes(free)} are used"
    else:
        chosen = "packed as it is"
    log.info(
        "data.cache=auto: split %s is %s. An image with its mask takes %.1f ms from its files and %.1f ms packed (%.1f "
        "times as fast); all %d would take about %s.",
        *(split, chosen, 1e3 * each, 1e3 * each / gain, gain, len(dataset), in_bytes(size)),
    )
    return gain >= _LEAST_GAIN and size <= _OF_FREE * free


def _seconds_on_disk(item: np.ndarray, folder: Path) -> float:
    """Return the seconds that bytes take to be read, in one call, from the disk itself.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(item.data)
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # the system forgets what it holds of the file
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        file.readinto(np.empty_like(item).data)
        return time.perf_counter() - start
