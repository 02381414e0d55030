"""Automatic choice of packing (`data.cache=auto`), measured on a few images and on the disk."""

import logging
import shutil
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np

from dinoseg.data.packed.store import aligned
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.utils.atomic import scratch_folder
from dinoseg.utils.disk_speed import seconds_on_disk
from dinoseg.utils.wording import in_bytes

log = logging.getLogger(__name__)

_TRIED = 5  # number of images measured
_LEAST_GAIN = 3.0  # minimum speed-up that is worth the disk space
_OF_FREE = 0.5  # maximum share of the free disk space


def pays(dataset: PairDataset, split: str, cache_dir: Path) -> bool:
    """Return whether to pack a dataset at full size, which leaves all pixels unchanged; log the reason.

    Raises:
        UserError: a measured image or mask cannot be read.
    """
    files, packed, sizes = [], [], []
    try:
        for row in range(0, len(dataset), -(-len(dataset) // _TRIED)):
            start = time.perf_counter()
            sample = dataset[row]
            files.append(time.perf_counter() - start)
            item = np.concatenate([sample["image"].numpy().reshape(-1), sample["mask"].numpy().reshape(-1)])
            sizes.append(item.nbytes)
            with scratch_folder(cache_dir, "measured") as folder:
                path = folder / "item"
                write, read = partial(path.write_bytes, item.data), partial(np.fromfile, path, np.uint8)
                packed.append(seconds_on_disk(path, write, read)[1])
        free = shutil.disk_usage(cache_dir).free
    except OSError as error:
        reason = f"nothing can be written to {cache_dir} ({error.strerror})"
        log.warning("data.cache=auto: split %s is read from its files, since %s.", split, reason)
        return False
    each, size = statistics.median(files), aligned(round(statistics.mean(sizes))) * len(dataset)
    gain = each / statistics.median(packed)
    if gain < _LEAST_GAIN:
        chosen = f"read from its files: packing pays off from a speed-up of {_LEAST_GAIN:g} on"
    elif size > _OF_FREE * free:
        chosen = f"read from its files: at most {_OF_FREE:.0%} of the disk's free {in_bytes(free)} are used"
    else:
        chosen = "packed at full size"
    log.info(
        "data.cache=auto: split %s is %s. An image with its mask takes %.1f ms from its files and %.1f ms packed (%.1f "
        "times as fast); all %d take about %s.",
        *(split, chosen, 1e3 * each, 1e3 * each / gain, gain, len(dataset), in_bytes(size)),
    )
    return gain >= _LEAST_GAIN and size <= _OF_FREE * free
