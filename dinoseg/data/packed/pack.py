"""Datasets packed once at training size, so that no epoch decodes images."""

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from io import RawIOBase
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dinoseg.core.shapes import Sample
from dinoseg.data.packed.read import Packed, paying_workers, read_all, reduced_size
from dinoseg.data.packed.store import (
    EXTENT_FORM,
    PIXELS,
    Extent,
    Store,
    StoreKey,
    aligned,
    checksum,
    open_store,
    write_index,
)
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.report.progress import Bar
from dinoseg.utils import forms
from dinoseg.utils.atomic import open_no_link, write_all
from dinoseg.utils.errors import DISK_FULL, UserError
from dinoseg.utils.images import open_image
from dinoseg.utils.locks import acquire, locked, release
from dinoseg.utils.wording import in_bytes

log = logging.getLogger(__name__)
_LISTED = 20


_JOURNAL = "journal.jsonl"
_LINE_FORM = forms.row(forms.whole(), *EXTENT_FORM)
_LONGEST_LINE = 128  # bytes of an item's line: five whole numbers
_SYNC_EVERY = 256 * 2**20  # most bytes that a power cut may lose


class Draft:
    """Unfinished store in its own folder; items of an earlier run are reused if they match their checksums.

    Args:
        folder: folder of the draft.
        key: key of the store.
        names: names of its items, in order.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, key: StoreKey, names: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.key, self.names = folder, key, names
        self.extents: dict[int, Extent] = {}
        self._end = self._synced = 0
        with contextlib.ExitStack() as opened:
            # unbuffered: a full disk raises at the write, and a kill loses no line
            self._pixels = opened.enter_context(_open(folder / PIXELS))
            self._journal = opened.enter_context(_open(folder / _JOURNAL))
            self._recover()
            self._files = opened.pop_all()

    def append(self, row: int, image: np.ndarray, mask: np.ndarray, crc: int) -> None:
        """Write an item after the last one, then its line in the journal.

        Raises:
            OSError: writing failed; the item does not count.
        """
        extent = Extent(aligned(self._end), mask.shape[0], mask.shape[1], crc)
        # pixels first: a line of the journal guarantees that its bytes exist
        self._pixels.seek(extent.offset)
        write_all(self._pixels, np.ascontiguousarray(image).data.cast("B"))
        write_all(self._pixels, np.ascontiguousarray(mask).data.cast("B"))
        line = json.dumps([row, extent.offset, extent.height, extent.width, extent.crc]) + "\n"
        write_all(self._journal, memoryview(line.encode()))
        self.extents[row] = extent
        self._end = extent.offset + extent.size
        if self._end - self._synced >= _SYNC_EVERY:
            self._sync()

    def finish(self, folder: Path) -> None:
        """Turn the draft, which must have every item, into the store at `folder` with an atomic rename."""
        self._sync()
        self._files.close()  # Windows cannot rename a folder that holds open files
        write_index(self.folder, self.key, self.names, [self.extents[row] for row in range(len(self.names))])
        os.replace(self.folder, folder)
        # the journal last: a build that is killed earlier can resume from it
        (folder / _JOURNAL).unlink()

    def close(self) -> None:
        """Flush to the disk, as far as there is room, and close the files."""
        if not self._pixels.closed:
            with contextlib.suppress(OSError):
                self._sync()
        self._files.close()

    def _sync(self) -> None:
        os.fsync(self._pixels.fileno())
        os.fsync(self._journal.fileno())
        self._synced = self._end

    def _recover(self) -> None:
        """Keep the items up to the first that does not match its journal line, and truncate the rest."""
        header = json.dumps(asdict(self.key)).encode() + b"\n"
        longest = len(json.dumps(asdict(self.key))) + _LONGEST_LINE * len(self.names)
        first, *lines = self._journal.read(longest).splitlines(keepends=True) or [b""]
        trusted = len(first) if first == header else 0  # bytes; 0 for the journal of another dataset
        for line in Bar(lines if trusted else [], desc="checking", unit="image", delay=2, leave=False):
            try:
                row, *numbers = forms.parse_json(line, _LINE_FORM)
            except forms.SchemaError:
                break  # incomplete line
            extent = Extent(*numbers)
            # after a power cut, the journal may be on the disk without the pixels
            if not self._holds(row, extent):
                break
            self.extents[row] = extent
            self._end = extent.offset + extent.size
            trusted += len(line)
        self._pixels.truncate(self._end)
        self._journal.truncate(trusted)
        self._journal.seek(trusted)
        if not trusted:
            write_all(self._journal, memoryview(header))

    def _holds(self, row: int, extent: Extent) -> bool:
        room = os.fstat(self._pixels.fileno()).st_size - extent.offset
        if extent.offset != aligned(self._end) or extent.size > room or row >= len(self.names):
            return False
        self._pixels.seek(extent.offset)
        item = np.frombuffer(self._pixels.read(extent.size), np.uint8)
        return checksum(self.names[row], (extent.height, extent.width), item) == extent.crc


def _open(path: Path) -> RawIOBase:
    file = open(path, "r+b", buffering=0, opener=lambda path, flags: open_no_link(path, flags | os.O_CREAT))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


class Unwritable(UserError):
    """Error that a store cannot be written, for lack of space or permission."""


class PackedDataset(PairDataset):
    """Dataset of image and mask files, read from a packed store.

    An item equals that of the files, reduced once to `longest` as by `Augment`. An augmented view of it has the same
    geometry as a view of the file. If `scale` enlarges it, it shows only the detail of the reduced image.

    Args:
        source: the dataset of files.
        store: its packed items.
        longest: maximum longer side to which they were reduced.
        rows: rows of the store, one per item; None: all.
    """

    def __init__(
        self, source: PairDataset, store: Store, longest: int | None, rows: Collection[int] | None = None
    ) -> None:
        super().__init__(source.pairs, source.reader.labels, source.reader.masks, source.lacking, source.remedy)
        self.reader, self.skipped, self._source = source.reader, source.skipped, source
        self.split_local_names = source.split_local_names
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
        image, mask = self.store.read(self.rows[index])
        pixels = torch.from_numpy(image).permute(2, 0, 1)  # (3, H, W)
        return Sample(image=pixels, mask=torch.from_numpy(mask), name=self.names[index])

    def mask(self, index: int) -> np.ndarray:
        """Return the mask (H, W) uint8 of an item."""
        return self.store.mask(self.rows[index])

    def image_hash(self, index: int) -> str:
        """Return a hash of the packed pixels of an image."""
        row = self.rows[index]
        if row not in self._hashes:
            image, _ = self.store.read(row)
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


def pack(
    dataset: PairDataset,
    *,
    cache_dir: str | Path,
    longest: int | None = None,
    workers: int | None = None,
    verify: bool = True,
) -> PackedDataset:
    """Return the dataset read from its packed store, which is built if it does not exist yet.

    A store is identified by the dataset's `fingerprint()` and `longest`: changed files, classes or rules need a new
    one. An interrupted build resumes; a second build of the same store waits for the first.

    Args:
        dataset: dataset of image and mask files.
        cache_dir: folder of the stores.
        longest: larger images are reduced until their longer side has this many pixels; None: original size.
        workers: number of reading processes; 1: this process; None: up to one per core, if there are enough items.
        verify: compare an item with its checksum when a process reads it for the first time.

    Raises:
        Unwritable: a folder cannot be written to, or has too little space.
        UserError: files cannot be read, or change while they are packed; when an item is read: a damaged store.
    """
    if longest is not None and longest < 1:
        raise UserError(f"resolution.longest={longest}: give a number of pixels, or null for no limit.")
    if workers is not None and workers < 1:
        raise UserError(f"data.workers={workers}: give the number of packing processes, 1 or more.")
    key = StoreKey(dataset.fingerprint(), longest)
    folder = Path(cache_dir).expanduser() / key.folder
    store = open_store(folder, key, dataset.names, verify=verify)
    if store is None:
        try:
            with locked(_lock(folder)):
                # another process may have built it while this one waited for the lock
                if open_store(folder, key, dataset.names, verify=verify) is None:
                    _build(dataset, folder, key, workers)
        except OSError as error:
            raise _unwritable(folder, error) from error
        store = open_store(folder, key, dataset.names, verify=verify)
    if store is None:
        raise UserError(f"{folder} was removed or changed by another process as soon as it was packed. Run again.")
    log.info("reading %d packed images and masks (%s) from %s", len(store.names), in_bytes(store.size), folder)
    return PackedDataset(dataset, store, longest)


def is_begun(dataset: PairDataset, cache_dir: Path) -> bool:
    """Return whether a full-size store of a dataset exists, finished or unfinished."""
    key = StoreKey(dataset.fingerprint(), None)
    folder = cache_dir / key.folder
    return _draft(folder).is_dir() or open_store(folder, key, dataset.names, verify=False) is not None


def drop_draft(dataset: PairDataset, cache_dir: Path) -> None:
    """Remove the unfinished full-size store of a dataset, unless another process is building it."""
    folder = cache_dir / StoreKey(dataset.fingerprint(), None).folder
    with contextlib.suppress(OSError):
        if (lock := acquire(_lock(folder))) is not None:
            shutil.rmtree(_draft(folder), ignore_errors=True)
            _lock(folder).unlink()
            release(lock)


def _build(dataset: PairDataset, folder: Path, key: StoreKey, workers: int | None) -> None:
    if folder.exists():
        log.warning("%s is incomplete or damaged: packing again.", folder)
        shutil.rmtree(folder)
    part = _draft(folder)
    _announce(dataset, folder, part, key.longest)
    with contextlib.closing(Draft(part, key, dataset.names)) as draft:
        if draft.extents:
            log.info("resuming: %d of %d are packed and match their checksums", len(draft.extents), len(dataset))
        failures = _fill(draft, dataset, key.longest, workers)
        if failures:
            raise _unreadable(failures, len(dataset))
        if dataset.fingerprint() != key.fingerprint:
            shutil.rmtree(part)
            raise UserError(
                "Images or masks were changed while they were packed. Run again when no process writes to them."
            )
        draft.finish(folder)


def _fill(draft: Draft, dataset: PairDataset, longest: int | None, workers: int | None) -> list[str]:
    """Append every item that the draft lacks; return the errors of those that cannot be read."""
    failures = []
    rows = [row for row in range(len(dataset)) if row not in draft.extents]
    workers = paying_workers(len(rows)) if workers is None else workers
    bar = Bar(total=len(dataset), initial=len(draft.extents), desc="packing", unit="image")
    with bar, contextlib.closing(read_all(dataset, rows, longest, workers)) as items:
        for row, item in items:
            if isinstance(item, Packed):
                draft.append(row, item.image, item.mask, item.crc)
            else:
                failures.append(str(item))
            bar.update()
    return failures


def _draft(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.part")


def _lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _announce(dataset: PairDataset, folder: Path, part: Path, longest: int | None) -> None:
    """Log the size of the store; raise Unwritable if the disk has no space for it."""
    size = sum(aligned(4 * height * width) for height, width in _sizes(dataset, longest))
    with contextlib.suppress(OSError):
        size -= (part / PIXELS).stat().st_size  # already written by an interrupted build
    free = shutil.disk_usage(folder.parent).free
    limit = f"reduced to at most {longest} pixels a side" if longest else "at full size"
    log.info(
        "packing %d images and masks %s: %s in %s (%s free)",
        len(dataset),
        limit,
        in_bytes(size),
        folder,
        in_bytes(free),
    )
    if size > free:
        raise Unwritable(
            f"Packing {len(dataset)} images and masks {limit} takes {in_bytes(size)}, and {folder.parent} has "
            f"{in_bytes(free)} free.{_others(folder)} Free some space, set another cache_dir, lower "
            "resolution.longest, or set data.cache=null."
        )


def _sizes(dataset: PairDataset, longest: int | None) -> Iterator[tuple[int, int]]:
    """Yield (H, W) of each packed image, from its header; for each video, decode one frame."""
    videos: dict[Path, tuple[int, int]] = {}
    for index, pair in enumerate(Bar(dataset.pairs, desc="sizes", unit="image", delay=2, leave=False)):
        size = (0, 0)  # of an unreadable file: packing reports its error
        with contextlib.suppress(OSError, SyntaxError, ValueError, UserError, Image.DecompressionBombError):
            if isinstance(pair.image, Path):
                with open_image(pair.image) as image:
                    size = image.height, image.width
            else:
                if pair.image.path not in videos:
                    _, height, width = dataset[index]["image"].shape
                    videos[pair.image.path] = height, width
                size = videos[pair.image.path]
        yield reduced_size(size, longest) if min(size) else size


def _unwritable(folder: Path, error: OSError) -> Unwritable:
    if error.errno in DISK_FULL:
        return Unwritable(
            f"The disk of {folder.parent} is full. The images packed so far remain.{_others(folder)} Free some space "
            "and run again to resume."
        )
    return Unwritable(
        f"Cannot pack to {folder} ({error}). Set a writable folder: cache_dir=FOLDER, or read the original files: "
        "data.cache=null."
    )


def _unreadable(failures: list[str], total: int) -> UserError:
    lines = "".join(f"\n- {line}" for line in failures[:_LISTED])
    more = f"\n- and {len(failures) - _LISTED} more" if len(failures) > _LISTED else ""
    return UserError(
        f"{len(failures)} of {total} images cannot be packed:{lines}{more}\nThe others are packed. Fix these files or "
        "leave them out (data.on_error=skip), and run again."
    )


def _others(folder: Path) -> str:
    """Return a sentence on the disk space of other stores, or "" if there are none."""
    stores = folder.parent.glob(f"packed_*/{PIXELS}")
    size = sum(path.stat().st_size for path in stores if not path.parent.name.startswith(folder.name))
    return f" Other packed data there takes {in_bytes(size)} (packed_*): remove unused folders." if size else ""
