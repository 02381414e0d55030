"""A data set as the config wants it opened: without what cannot be used, and from one packed file."""

import logging
from collections.abc import Callable
from pathlib import Path

from dinoseg.core.shapes import SegmentationData
from dinoseg.data.custom import CustomDataset
from dinoseg.data.packed.choice import pays
from dinoseg.data.packed.pack import Unwritable, drop_draft, is_begun, pack
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.pairs.pairing import not_whole
from dinoseg.data.scan.scan import scan, unreadable
from dinoseg.data.splits import labelled_names
from dinoseg.utils.cores import count_cores
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, HighShare, Natural
from dinoseg.utils.wording import reasons

log = logging.getLogger(__name__)

ON_ERROR = ("stop", "skip")
CACHES = (None, "packed", "auto")


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
    decided: Callable[[Callable[[], bool]], bool] = lambda find: find(),
) -> SegmentationData:
    """Return the data set as it is to be used.

    Args:
        dataset: what the reader found. One that is no `PairDataset` reads its samples itself: `skip` and `packed` are
            refused, `auto` has no effect.
        split: its name, for messages.
        reduced: it is trained on: packed at `longest`. Else at full size, since it is scored there.
        on_error: `stop`: what is no whole pair is an error now, and a file that cannot be read when it is read.
            `skip`: all files are read once, and what cannot be used is left out; `skipped` of the data set names it.
        cache: `packed`: images and masks come from one file of raw pixels, which is made first. `auto`: so they do as
            they are, at full size, if the data set is trained on, it fits the disk, and reading it so is much faster.
        cache_dir: folder of the packed files and of what is known of the files.
        longest: see `pack`.
        workers: processes that read all files once, for `skip` and `packed`; None: one per core.
        labelled: which masks are used, see `labelled_names`; None: all.
        group: likewise.
        seed: likewise.
        decided: gives what is found, on several ranks what the first one finds: each would measure another speed. All
            of them pack then, and all but one wait for it.

    Raises:
        UserError: an unknown option, an image without mask or a mask without image, or nothing that can be used.
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
        log.info("data.labelled=%s: %d of %d images of split %s with their masks", labelled, len(dataset), whole, split)
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
        raise not_whole(dataset, split)
    folder = Path(cache_dir).expanduser()
    if cache == "auto" and reduced and decided(lambda: is_begun(dataset, folder) or pays(dataset, split, folder)):
        return _packed_if_there_is_room(dataset, split, cache_dir, workers)
    if cache == "packed":
        return pack(dataset, cache_dir=cache_dir, longest=longest if reduced else None, workers=workers)
    return dataset


def _packed_if_there_is_room(
    dataset: PairDataset, split: str, cache_dir: str | Path, workers: int | None
) -> PairDataset:
    try:
        return pack(dataset, cache_dir=cache_dir, workers=workers)
    except Unwritable as error:  # the room that there was is gone
        folder = Path(cache_dir).expanduser()
        drop_draft(dataset, folder)
        log.warning(
            "data.cache=auto: split %s is read from its files, since it cannot be packed to %s (%s). What was "
            "packed so far is removed.",
            *(split, folder, error.__cause__ or "there is too little room"),
        )
        return dataset


def _usable(dataset: PairDataset, split: str, cache_dir: Path, workers: int) -> PairDataset:
    """Return the pairs of which both files can be used, and say what else there is."""
    bad = unreadable(scan(dataset.pairs, dataset.reader, workers=workers, cache_dir=cache_dir))
    if len(bad) == len(dataset):
        raise UserError(f"No image of split {split} can be used with its mask:{reasons(bad, 3)}")
    bad = {**dataset.lacking, **bad}
    if not bad:
        return dataset
    usable = dataset.keep({*dataset.names} - bad.keys())
    usable.skipped, usable.lacking = bad, {}
    log.warning("data.on_error=skip: split %s has %d images; left out: %d.", split, len(usable), len(bad))
    return usable
