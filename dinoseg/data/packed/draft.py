"""A store that is being packed: appended item by item, with a journal to go on from after a kill."""

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from io import RawIOBase
from pathlib import Path

import numpy as np

from dinoseg.data.packed.store import PIXELS, PLACE_FORM, Place, StoreKey, aligned, checksum, write_index
from dinoseg.report.progress import Bar
from dinoseg.storage import forms

_JOURNAL = "journal.jsonl"
_LINE_FORM = forms.row(forms.whole(), *PLACE_FORM)
_SYNC_EVERY = 256 * 2**20  # bytes that a power cut may cost


class Draft:
    """An unfinished store in its own folder; what an earlier run packed and still matches its checksum is kept.

    Args:
        folder: of the draft.
        key: of the store.
        names: of its items, in order.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: Path, key: StoreKey, names: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.key, self.names = folder, key, names
        self.places: dict[int, Place] = {}
        self._end = self._synced = 0
        with contextlib.ExitStack() as opened:
            # unbuffered: a full disk is met where the write is, and a kill loses no line
            self._pixels = opened.enter_context(_open(folder / PIXELS))
            self._journal = opened.enter_context(_open(folder / _JOURNAL))
            self._recover()
            self._files = opened.pop_all()

    def append(self, row: int, image: np.ndarray, mask: np.ndarray, crc: int) -> None:
        """Write an item behind the last one, then its line in the journal.

        Raises:
            OSError: writing failed; the item does not count.
        """
        place = Place(aligned(self._end), mask.shape[0], mask.shape[1], crc)
        self._pixels.seek(place.offset)
        write_whole(self._pixels, np.ascontiguousarray(image).data.cast("B"))
        write_whole(self._pixels, np.ascontiguousarray(mask).data.cast("B"))
        line = json.dumps([row, place.offset, place.height, place.width, place.crc]) + "\n"
        write_whole(self._journal, memoryview(line.encode()))
        self.places[row] = place
        self._end = place.offset + place.size
        if self._end - self._synced >= _SYNC_EVERY:
            self._sync()

    def finish(self, folder: Path) -> None:
        """Turn the draft, which has every item, into the store at `folder`, at once."""
        self._sync()
        write_index(self.folder, self.key, self.names, [self.places[row] for row in range(len(self.names))])
        os.replace(self.folder, folder)
        (folder / _JOURNAL).unlink()

    def close(self) -> None:
        """Make what there is durable, as far as a full disk lets it."""
        with contextlib.suppress(OSError):
            self._sync()
        self._files.close()

    def _sync(self) -> None:
        os.fsync(self._pixels.fileno())
        os.fsync(self._journal.fileno())
        self._synced = self._end

    def _recover(self) -> None:
        """Keep the items up to the first that is not as its journal line says, and cut the rest off."""
        header = json.dumps(asdict(self.key)).encode() + b"\n"
        first, *lines = self._journal.read().splitlines(keepends=True) or [b""]
        kept = len(first) if first == header else 0
        for line in Bar(lines if kept else [], desc="checking", unit="image", delay=2, leave=False):
            try:
                row, *numbers = forms.parse_json(line, _LINE_FORM)
            except forms.Misshapen:
                break  # a torn line
            place = Place(*numbers)
            if not self._holds(row, place):
                break
            self.places[row] = place
            self._end = place.offset + place.size
            kept += len(line)
        self._pixels.truncate(self._end)
        self._journal.truncate(kept)
        self._journal.seek(kept)
        if not kept:
            write_whole(self._journal, memoryview(header))

    def _holds(self, row: int, place: Place) -> bool:
        room = os.fstat(self._pixels.fileno()).st_size - place.offset
        if place.offset != aligned(self._end) or place.size > room or row >= len(self.names):
            return False
        self._pixels.seek(place.offset)
        item = np.frombuffer(self._pixels.read(place.size), np.uint8)
        return checksum(self.names[row], (place.height, place.width), item) == place.crc


def write_whole(file: RawIOBase, data: memoryview) -> None:
    """Write all bytes; a disk that fills up takes the first of them before it refuses."""
    while data:
        data = data[file.write(data) :]


def _open(path: Path) -> RawIOBase:
    path.touch()
    return open(path, "r+b", buffering=0)
