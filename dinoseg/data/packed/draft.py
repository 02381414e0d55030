"""Unfinished packed store: items are appended one by one, with a journal to resume from after a kill."""

import contextlib
import errno
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import asdict
from io import RawIOBase
from pathlib import Path

import numpy as np

from dinoseg.data.packed.store import EXTENT_FORM, PIXELS, Extent, StoreKey, aligned, checksum, write_index
from dinoseg.report.progress import Bar
from dinoseg.utils import forms
from dinoseg.utils.atomic import open_no_link, write_whole

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
        write_whole(self._pixels, np.ascontiguousarray(image).data.cast("B"))
        write_whole(self._pixels, np.ascontiguousarray(mask).data.cast("B"))
        line = json.dumps([row, extent.offset, extent.height, extent.width, extent.crc]) + "\n"
        write_whole(self._journal, memoryview(line.encode()))
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
            except forms.Misshapen:
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
            write_whole(self._journal, memoryview(header))

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
