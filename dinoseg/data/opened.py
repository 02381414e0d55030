"""Dataset preparation as configured: label subset, skipped files, and packing into one file."""

import logging
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from dinoseg.core.shapes import SegmentationData
from dinoseg.data.custom import CustomDataset
from dinoseg.data.packed.pack import Unwritable, drop_draft, is_begun, pack
from dinoseg.data.packed.store import aligned
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pairing import incomplete_pairs_error
from dinoseg.data.scan.scan import scan, unreadable
from dinoseg.data.splits import labelled_names
from dinoseg.utils.atomic import scratch_folder
from dinoseg.utils.cores import count_cores
from dinoseg.utils.disk_speed import seconds_on_disk
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, HighShare, Natural
from dinoseg.utils.wording import in_bytes, reasons

ON_ERROR = ("stop", "skip")
CACHES = (None, "packed", "auto")


logger = logging.getLogger(__name__)
_TRIED = 5  # number of images measured
_MIN_GAIN = 3.0  # minimum speed-up that is worth the disk space
_OF_FREE = 0.5  # maximum share of the free disk space


def opened(
    dataset: SegmentationData,
    *,
    split: str,
    reduced: bool = False,
    on_error: str = "stop",
    cache: str | None = None,
    cache_dir: str | Path = "outputs/.cache",
    longest: Count | None = None,
    workers: Count | None = None,
    labelled: HighShare | str | None = None,
    group: str | None = None,
    seed: Natural = 0,
    run_on_rank0: Callable[[Callable[[], bool]], bool] = lambda find: find(),
) -> SegmentationData:
    """Return the dataset, prepared as configured.

    Args:
        dataset: result of the reader. If it is not a `PairDataset`, it reads its own samples: `skip` and `packed` raise
            an error, and `auto` is a no-op.
        split: name of the split, for messages.
        reduced: the split is for training and may be packed at `longest`. Other splits are packed at full size, which
            scoring needs.
        on_error: `stop`: an incomplete pair is an error now, and an unreadable file when it is read. `skip`: read all
            files once and leave out unusable ones; `skipped` of the dataset names them.
        cache: `packed`: read images and masks from one file of raw pixels, which is created first. `auto`: do so at
            full size, if the split is for training, fits on the disk, and reads much faster that way.
        cache_dir: folder of the packed files and of the cached scan results.
        longest: see `pack`.
        workers: processes that read all files once, for `skip` and `packed`; None: one per core.
        labelled: selects the masks to use, see `labelled_names`; None: all.
        group: see `labelled_names`.
        seed: see `labelled_names`.
        run_on_rank0: runs a decision and returns its result. With several ranks, all get the first rank's result, since
            each would measure a different speed. All ranks then call `pack`, and all but one wait for it.

    Raises:
        UserError: an unknown option, an image without mask or a mask without image, or no usable image.
    """
    if on_error not in ON_ERROR:
        raise UserError(f"data.on_error={on_error} is unknown. Choose one of {', '.join(ON_ERROR)}.")
    if cache not in CACHES:
        raise UserError(f"data.cache={cache} is unknown. Choose packed or auto, or null for none.")
    if workers is not None and workers < 1:
        raise UserError(f"data.workers={workers}: give the number of processes, 1 or more, or null for one per core.")
    assert isinstance(dataset, PairDataset | CustomDataset)
    if labelled is not None:
        whole, dataset = len(dataset), dataset.keep({*labelled_names(dataset.names, labelled, seed=seed, group=group)})
        logger.info(
            "data.labelled=%s: %d of %d images of split %s with their masks", labelled, len(dataset), whole, split
        )
    if not isinstance(dataset, PairDataset):
        for key, value in (("on_error", on_error), ("cache", cache)):
            if value in ("skip", "packed"):
                raise UserError(
                    f"data.{key}={value} needs a reader that returns a dinoseg.data.pairs.dataset.PairDataset, and "
                    f"data.reader gives a {type(dataset.samples).__name__}. Leave data.{key} out."
                )
        return dataset
    if on_error == "skip":
        dataset = _usable(dataset, split, Path(cache_dir), workers or count_cores())
    elif dataset.lacking:
        raise incomplete_pairs_error(dataset, split)
    folder = Path(cache_dir).expanduser()
    if cache == "auto" and reduced and run_on_rank0(lambda: is_begun(dataset, folder) or pays(dataset, split, folder)):
        return _packed_if_there_is_room(dataset, split, cache_dir, workers)
    if cache == "packed":
        return pack(dataset, cache_dir=cache_dir, longest=longest if reduced else None, workers=workers)
    return dataset


def _packed_if_there_is_room(
    dataset: PairDataset, split: str, cache_dir: str | Path, workers: int | None
) -> PairDataset:
    try:
        return pack(dataset, cache_dir=cache_dir, workers=workers)
    except Unwritable as error:  # the free space has been used up since it was checked
        folder = Path(cache_dir).expanduser()
        drop_draft(dataset, folder)
        logger.warning(
            "data.cache=auto: split %s is read from its files, since it cannot be packed to %s (%s). The incomplete "
            "packed data is removed.",
            *(split, folder, error.__cause__ or "there is too little room"),
        )
        return dataset


def _usable(dataset: PairDataset, split: str, cache_dir: Path, workers: int) -> PairDataset:
    """Return the pairs whose two files are both usable, and log the others."""
    bad = unreadable(scan(dataset.pairs, dataset.reader, workers=workers, cache_dir=cache_dir))
    if len(bad) == len(dataset):
        raise UserError(f"No image of split {split} has a usable mask:{reasons(bad, 3)}")
    bad = {**dataset.lacking, **bad}
    if not bad:
        return dataset
    usable = dataset.keep({*dataset.names} - bad.keys())
    usable.skipped, usable.lacking = bad, {}
    logger.warning("data.on_error=skip: split %s has %d images; left out: %d.", split, len(usable), len(bad))
    return usable


def pays(dataset: PairDataset, split: str, cache_dir: Path) -> bool:
    """Return whether to pack a dataset at full size, which leaves all pixels unchanged; logger the reason.

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
        logger.warning("data.cache=auto: split %s is read from its files, since %s.", split, reason)
        return False
    each, size = statistics.median(files), aligned(round(statistics.mean(sizes))) * len(dataset)
    gain = each / statistics.median(packed)
    if gain < _MIN_GAIN:
        chosen = f"read from its files: packing pays off from a speed-up of {_MIN_GAIN:g} on"
    elif size > _OF_FREE * free:
        chosen = f"read from its files: at most {_OF_FREE:.0%} of the disk's free {in_bytes(free)} are used"
    else:
        chosen = "packed at full size"
    logger.info(
        "data.cache=auto: split %s is %s. An image with its mask takes %.1f ms from its files and %.1f ms packed (%.1f "
        "times as fast); all %d take about %s.",
        *(split, chosen, 1e3 * each, 1e3 * each / gain, gain, len(dataset), in_bytes(size)),
    )
    return gain >= _MIN_GAIN and size <= _OF_FREE * free
