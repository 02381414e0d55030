"""A data set as the config wants it opened: without what cannot be read, and from one packed file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from dinoseg.data.pairs import PairDataset
from dinoseg.errors import UserError

if TYPE_CHECKING:
    from dinoseg.data.packed import PackedDataset

log = logging.getLogger(__name__)

ON_ERROR = ("stop", "skip")
CACHES = (None, "packed")


def opened(
    dataset: PairDataset,
    *,
    split: str,
    on_error: str = "stop",
    cache: str | None = None,
    cache_dir: str | Path = "outputs/.cache",
    longest: int | None = None,
) -> PairDataset | PackedDataset:
    """Return the data set as it is to be used.

    Args:
        dataset: what the reader found.
        split: `train` is packed at `longest`, the others at full size, since they are scored there.
        on_error: `stop`: a file that cannot be read is an error when it is read. `skip`: all files are read once, and
            the pairs that cannot be are left out; `skipped` of the data set names them.
        cache: `packed`: images and masks come from one memory-mapped file, which is made first.
        cache_dir: folder of the packed files and of what is known of the files.
        longest: see `pack`.

    Raises:
        UserError: an unknown option, or nothing that can be read.
    """
    if on_error not in ON_ERROR:
        raise UserError(f"data.on_error={on_error} is unknown. Choose one of {', '.join(ON_ERROR)}.")
    if cache not in CACHES:
        raise UserError(f"data.cache={cache} is unknown. Choose packed, or null for none.")
    if on_error == "skip":
        dataset = _readable(dataset, split, Path(cache_dir))
    if cache == "packed":
        from dinoseg.data.packed import pack

        return pack(dataset, cache_dir=cache_dir, longest=longest if split == "train" else None)
    return dataset


def _readable(dataset: PairDataset, split: str, cache_dir: Path) -> PairDataset:
    """Return the pairs of which both files can be read, and say which cannot."""
    from dinoseg.data.scan import scan, unreadable

    bad = unreadable(scan(dataset.pairs, dataset.reader, workers=2, cache_dir=cache_dir))
    if not bad:
        return dataset
    if len(bad) == len(dataset):
        name, reason = next(iter(bad.items()))
        raise UserError(f"No image of split {split} can be read with its mask. The first, {name}: {reason}")
    log.warning("data.on_error=skip: %d of %d images of split %s are left out.", len(bad), len(dataset), split)
    kept = dataset.keep({name for name in dataset.names if name not in bad})
    kept.skipped = bad
    return kept
