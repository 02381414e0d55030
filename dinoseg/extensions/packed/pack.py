"""Datasets packed once at training size, so that no epoch decodes images."""

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import torch

from dinoseg.core.channels import ChannelFiles
from dinoseg.core.object_ids import OBJECTS
from dinoseg.core.shapes import Sample
from dinoseg.core.sizes import backbone_size
from dinoseg.core.sources import ImageSource
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.extensions.packed.read import Packed, paying_workers, read_all
from dinoseg.extensions.packed.store import PIXELS, Extent, Store, StoreKey, open_store, write_index
from dinoseg.report.progress import Bar
from dinoseg.utils.atomic import atomic_folder, create_cache_dir
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_size
from dinoseg.utils.locks import hold_lock
from dinoseg.utils.ranges import Count, check_annotations
from dinoseg.utils.wording import in_bytes, list_reasons

log = logging.getLogger(__name__)


class PackedDataset(PairDataset):
    """Dataset of image and mask files, read from a packed store.

    An item equals that of the files, reduced once to `longest` as by `Augment`. An augmented view of it has the same
    geometry as a view of the file. If `scale` enlarges it, it shows only the detail of the reduced image. Maps are
    computed from the packed item.

    Args:
        source: the dataset of files.
        store: its packed items.
        longest: maximum longer side to which they were reduced.
        rows: rows of the store, one per item; None: all.
    """

    decodes_files = False

    def __init__(
        self, source: PairDataset, store: Store, longest: int | None, rows: Collection[int] | None = None
    ) -> None:
        super().__init__(source.pairs, source.reader.labels, source.reader.masks, source.lacking, source.remedy)
        self.reader, self.skipped, self._source = source.reader, source.skipped, source
        self.split_local_names = source.split_local_names
        self.maps, self.compute_maps = source.maps, source.compute_maps
        self.store, self.longest = store, longest
        self.rows = list(range(len(source)) if rows is None else rows)
        self._hashes: dict[int, str] = {}  # row to hash of its image

    @property
    def source(self) -> PairDataset:
        """Dataset of the original files."""
        return self._source

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        image, mask, objects = self.store.read(self.rows[index])
        pixels = torch.from_numpy(image).permute(2, 0, 1)  # (C, H, W)
        sample = Sample(image=pixels, mask=torch.from_numpy(mask), name=self.names[index])
        if OBJECTS in self.maps:
            sample["maps"] = {OBJECTS: torch.from_numpy(objects)}
        return self.add_maps(sample)

    def mask(self, index: int) -> np.ndarray:
        """Return the mask (H, W) uint8 of an item."""
        return self.store.mask(self.rows[index])

    def image_hash(self, index: int) -> str:
        """Return a hash of the packed pixels of an image."""
        row = self.rows[index]
        if row not in self._hashes:
            image, _, _ = self.store.read(row)
            self._hashes[row] = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
        return self._hashes[row]

    def keep(self, names: Collection[str]) -> "PackedDataset":
        """Return the dataset restricted to these names, in the same order and from the same store."""
        rows = [row for row, name in zip(self.rows, self.names, strict=True) if name in names]
        return PackedDataset(self.source.keep(names), self.store, self.longest, rows)

    def fingerprint(self) -> str:
        """Return a hash of everything that the masks depend on; equal to that of the files if nothing was reduced."""
        base = self.source.fingerprint()
        return base if self.longest is None else hashlib.sha256(f"{base} longest={self.longest}".encode()).hexdigest()


@check_annotations
def pack(
    dataset: PairDataset,
    *,
    cache_dir: str | Path,
    longest: Count | None = None,
    workers: Count | None = None,
) -> PackedDataset:
    """Return the dataset read from its packed store, which is built if it does not exist yet.

    A store is identified by the dataset's `fingerprint()` and `longest`: changed files, classes or rules need a new
    one. A second build of the same store waits for the first.

    Args:
        dataset: dataset of image and mask files.
        cache_dir: folder of the stores.
        longest: larger images are reduced until their longer side has this many pixels; None: original size.
        workers: number of reading processes; 1: this process; None: up to one per core, if there are enough items.

    Raises:
        UserError: the folder cannot be written to or has too little space, or files cannot be read or change while
            they are packed, or the masks have layers; when an item is read: a damaged store.
    """
    if dataset.has_layers:
        raise UserError("cache=packed stores one class per pixel, and these masks have layers. Leave it out.")
    key = StoreKey(dataset.fingerprint(), longest)
    folder = Path(cache_dir).expanduser() / key.folder
    store = open_store(folder, key, dataset.names)
    if store is None:
        try:
            create_cache_dir(folder.parent)
            with hold_lock(folder.with_name(f".{folder.name}.lock")):
                # another process may have built it while this one waited for the lock
                if open_store(folder, key, dataset.names) is None:
                    _build(dataset, folder, key, workers)
        except OSError as error:
            raise UserError(
                f"Cannot pack to {folder} ({error}). Free some space, set another writable folder (cache_dir=FOLDER), "
                "or read the original files (cache=null)."
            ) from error
        store = open_store(folder, key, dataset.names)
    if store is None:
        raise UserError(f"{folder} was removed or changed by another process as soon as it was packed. Run again.")
    log.info("reading %d packed images and masks (%s) from %s", len(store.names), in_bytes(store.size), folder)
    return PackedDataset(dataset, store, longest)


def _build(dataset: PairDataset, folder: Path, key: StoreKey, workers: int | None) -> None:
    if folder.exists():
        log.warning("%s is incomplete or damaged: packing again.", folder)
        shutil.rmtree(folder)
    _check_space(dataset, folder, key.longest)
    with atomic_folder(folder) as part:
        extents = _write_pixels(part / PIXELS, dataset, key.longest, workers)
        if dataset.fingerprint() != key.fingerprint:
            raise UserError(
                "Images or masks were changed while they were packed. Run again when no process writes to them."
            )
        write_index(part, key, dataset.names, extents)


def _write_pixels(path: Path, dataset: PairDataset, longest: int | None, workers: int | None) -> list[Extent]:
    """Write all items to a file; return their byte ranges.

    Raises:
        UserError: a file of the dataset cannot be read; all such files are read first and named.
    """
    extents: list[Extent] = []
    failures: dict[str, str] = {}
    workers = paying_workers(len(dataset)) if workers is None else workers
    bar = Bar(total=len(dataset), desc="packing", unit="image")
    with open(path, "xb") as file, bar, contextlib.closing(read_all(dataset, longest, workers)) as items:
        for row, item in items:
            if isinstance(item, Packed):
                height, width = item.mask.shape
                channels, depth = item.image.shape[2], item.image.itemsize
                extents.append(Extent(file.tell(), height, width, item.crc, channels, depth, len(item.objects)))
                file.write(np.ascontiguousarray(item.image).data)
                file.write(np.ascontiguousarray(item.mask).data)
                file.write(np.ascontiguousarray(item.objects).tobytes())
            else:
                failures[dataset.names[row]] = str(item)
            bar.update()
        file.flush()
        os.fsync(file.fileno())
    if failures:
        raise UserError(
            f"{len(failures)} of {len(dataset)} images cannot be packed:{list_reasons(failures)}\nFix these files "
            "or leave them out (on_error=skip), and run again. mode=doctor lists all, in doctor.json."
        )
    return extents


def _check_space(dataset: PairDataset, folder: Path, longest: int | None) -> None:
    """Log the size of the store; raise a UserError if the disk has no space for it."""
    per_pixel = 1 + 4 * (OBJECTS in dataset.maps) + max(_bytes_per_pixel(pair.image) for pair in dataset.pairs)
    size = sum(per_pixel * height * width for height, width in _sizes(dataset, longest))
    free = shutil.disk_usage(folder.parent).free
    limit = f"reduced to at most {longest} pixels a side" if longest else "at full size"
    log.info(
        "packing %d images and masks %s: %s in %s (%s free)",
        *(len(dataset), limit, in_bytes(size), folder, in_bytes(free)),
    )
    if size > free:
        raise UserError(
            f"Packing {len(dataset)} images and masks {limit} takes {in_bytes(size)}, and {folder.parent} has "
            f"{in_bytes(free)} free. Free some space, set cache_dir=FOLDER on another disk or a lower longest=PIXELS, "
            "or read the original files (cache=null)."
        )


def _bytes_per_pixel(source: ImageSource) -> int:
    """Return the most bytes of a pixel of an image."""
    return 2 * source.format.channels if isinstance(source, ChannelFiles) else 3


def _sizes(dataset: PairDataset, longest: int | None) -> Iterator[tuple[int, int]]:
    """Yield (H, W) of each packed image, from its header; for each video, decode one frame."""
    videos: dict[Path, tuple[int, int]] = {}
    for index, pair in enumerate(Bar(dataset.pairs, desc="sizes", unit="image", delay=2, leave=False)):
        try:
            if isinstance(pair.image, Path):
                size = read_size(pair.image)
            elif isinstance(pair.image, ChannelFiles):
                size = pair.image.size()
            else:
                if pair.image.path not in videos:
                    _, height, width = dataset[index]["image"].shape
                    videos[pair.image.path] = height, width
                size = videos[pair.image.path]
        except UserError:  # packing reports it
            continue
        yield backbone_size(size, 1.0, longest)
