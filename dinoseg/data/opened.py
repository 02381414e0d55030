"""Dataset preparation as configured: label subset, skipped files, and packing into one file."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from dinoseg.core.shapes import SegmentationData
from dinoseg.data.custom import CustomDataset
from dinoseg.data.pairs.dataset import PairDataset, incomplete_pairs_error
from dinoseg.data.scan.scan import scan, unreadable
from dinoseg.data.splits import labelled_names
from dinoseg.utils.cores import count_cores
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Natural, OnError, Range
from dinoseg.utils.wording import list_reasons

logger = logging.getLogger(__name__)
LabelledShare = Annotated[float, Range("a share above 0 and at most 1, a file of names", 0, 1, open_at=(0,))]


def prepare_dataset(
    dataset: PairDataset | CustomDataset,
    *,
    split: str,
    reduced: bool = False,
    on_error: OnError = "stop",
    cache: Literal["packed"] | None = None,
    pack: Callable[..., SegmentationData] | None = None,
    cache_dir: str | Path = "outputs/.cache",
    longest: Count | None = None,
    workers: Count | None = None,
    labelled: LabelledShare | str | None = None,
    group: str | None = None,
    seed: Natural = 0,
) -> SegmentationData:
    """Return the dataset, prepared as configured.

    Args:
        dataset: result of the reader. If it is not a `PairDataset`, it reads its own samples: `skip` and `packed` raise
            an error.
        split: name of the split, for messages.
        reduced: the split is for training and may be packed at `longest`. Other splits are packed at full size, which
            scoring needs.
        on_error: `stop`: an incomplete pair is an error now, and an unreadable file when it is read. `skip`: read all
            files once and leave out unusable ones; `skipped` of the dataset names them.
        cache: `packed`: read images and masks from one file of raw pixels, which is created first; with several ranks
            by the first one. None: read the files.
        pack: packs a dataset for `packed`, as `dinoseg.extensions.packed.pack.pack`.
        cache_dir: folder of the packed files and of the cached scan results.
        longest: pixels of the longer side to which larger packed images are reduced; None: original size.
        workers: threads that read all files once, for `skip`, and processes for `packed`; None: one per core.
        labelled: selects the masks to use, see `labelled_names`; None: all.
        group: see `labelled_names`.
        seed: see `labelled_names`.

    Raises:
        UserError: an image without mask or a mask without image, or no usable image; or `packed` without `pack`.
    """
    if labelled is not None:
        whole = len(dataset)
        dataset = dataset.keep({*labelled_names(dataset.names, labelled, seed=seed, group=group)})
        logger.info("%d of %d images of split %s with their masks (labelled=%s)", len(dataset), whole, split, labelled)
    if not isinstance(dataset, PairDataset):
        if on_error == "skip" or cache == "packed":
            raise UserError(
                f"on_error={on_error} with cache={cache}: `skip` and `packed` need a reader that returns a "
                f"dinoseg.data.pairs.dataset.PairDataset, and this one gives a {type(dataset.samples).__name__}. Leave "
                "them out."
            )
        return dataset
    if on_error == "skip":
        dataset = _select_usable(dataset, split, Path(cache_dir), workers or count_cores())
    elif dataset.lacking:
        raise incomplete_pairs_error(dataset, split)
    if cache == "packed":
        if pack is None:
            raise UserError("cache=packed is not part of this installation. Leave it out.")
        return pack(dataset, cache_dir=cache_dir, longest=longest if reduced else None, workers=workers)
    return dataset


def _select_usable(dataset: PairDataset, split: str, cache_dir: Path, workers: int) -> PairDataset:
    """Return the pairs whose two files are both usable, and log the others."""
    bad = unreadable(scan(dataset.pairs, dataset.reader, workers=workers, cache_dir=cache_dir))
    if len(bad) == len(dataset):
        raise UserError(
            f"No image of split {split} has a usable mask. If images and masks are swapped, swap their folders."
            f"{list_reasons(bad)}"
        )
    bad = {**dataset.lacking, **bad}
    if not bad:
        return dataset
    usable = dataset.keep({*dataset.names} - bad.keys())
    usable.skipped, usable.lacking = bad, {}
    logger.warning("split %s has %d images; left out: %d.", split, len(usable), len(bad))
    return usable
