"""Stores of cached features on disk or in memory, by key; missing features only have to be computed again."""

import logging
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dinoseg.extensions.feature_cache.form import (
    MAX_BYTES,
    Stored,
    from_file,
    restore_features,
    round_features,
    to_bytes,
)
from dinoseg.utils.atomic import atomic_file, write_all
from dinoseg.utils.errors import DISK_FULL, UserError, WaitEnded, free_space
from dinoseg.utils.files import open_regular
from dinoseg.utils.forms import SchemaError
from dinoseg.utils.locks import hold_lock
from dinoseg.utils.ranges import Positive
from dinoseg.utils.waiting import NOTICE
from dinoseg.utils.wording import in_bytes

log = logging.getLogger(__name__)

_SUFFIX = ".features"
_RESERVE = 2**30  # bytes of the disk left free for checkpoints
_STEP = 2**28  # bytes that are evicted at once, and written between two counts of the folder's size
_POLL = 0.005  # seconds between two looks at whether another process has computed an image: a tenth of its pass
_PATIENCE = 60.0  # seconds to wait for the process that computes an image: a pass takes far less
_CLOCKS = 10**10  # nanoseconds, maximum difference between the clocks of a file server and of this machine


class FeatureStore(Protocol):
    """Store of a model's frozen features per image, by a key that is a hash of everything they depend on."""

    stored: Stored

    @property
    def folder(self) -> Path | None:
        """Folder of the files; None: in memory."""
        ...

    def get(self, key: str) -> list[Tensor] | None:
        """Return the tensors of a key; None if they are missing or incomplete."""
        ...

    def put(self, key: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Store tensors if there is room, and return them as `get` would: rounded, on the CPU.

        Raises:
            UserError: a number is not finite, or would not be in the stored type.
        """
        ...

    def claim(self, key: str) -> AbstractContextManager[None]:
        """Let one process at a time compute a key within the block, so that jobs of a sweep share the work."""
        ...

    def trust(self, key: str) -> None:
        """Mark a key as verified: a worker of this process has read it."""
        ...

    def __contains__(self, key: str) -> bool:
        """Return whether a key has an entry, complete or not."""
        ...

    def room(self) -> int:
        """Return the bytes that can still be stored."""
        ...


class MemoryStore:
    """Features in the memory of this process.

    Args:
        stored: type in which numbers are stored.
        cap: maximum size in bytes.
    """

    folder = None

    def __init__(self, stored: Stored, cap: int) -> None:
        self.stored, self.cap = stored, cap
        self._entries: dict[str, list[Tensor]] = {}
        self._used = 0
        self._closed = False  # whether storing has ended

    def get(self, key: str) -> list[Tensor] | None:
        """Return the tensors of a key; None if they are missing."""
        cached = self._entries.get(key)
        return None if cached is None else restore_features(cached)

    def put(self, key: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Store tensors if there is room, and return them as `get` would."""
        converted = _round_with_warning(tensors, self.stored)
        if key not in self._entries and not self._closed:
            size = sum(tensor.nbytes for tensor in converted)
            if size <= self.room():
                # a slice would keep its whole batch in memory
                self._entries[key] = [tensor.clone() for tensor in converted]
                self._used += size
            else:
                self._closed = True
                _log_end(f"The {in_bytes(self.cap)} of memory for features are used up")
        return restore_features(converted)

    def claim(self, key: str) -> AbstractContextManager[None]:
        """Do nothing: no other process sees this memory."""
        return nullcontext()

    def trust(self, key: str) -> None:
        """Do nothing: entries in memory are not verified."""

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def room(self) -> int:
        """Return the bytes that can still be stored."""
        return self.cap - self._used


class DiskStore:
    """Features in files, one per key, which are written atomically and verified when a process first reads them.

    Damaged or foreign files count as missing. Several processes may use one folder. The least-recently-used files are
    evicted for new features, except those written or read since this store was opened. A run that reads each image once
    per epoch would need exactly these next.

    Args:
        root: folder of all features of this machine.
        origin: name of this run's folder in it, see `key.origin`.
        stored: type in which numbers are stored.
        cap: maximum bytes in `root`; None: all of the free disk but 1 GiB.
    """

    def __init__(self, root: Path, origin: str, stored: Stored, cap: int | None = None) -> None:
        self.root, self.folder, self.stored, self.cap = root, root / origin, stored, cap
        self._opened = time.time_ns() - _CLOCKS
        self._used = self._written = 0  # bytes in `root`, and bytes written since they were counted
        self._seen: set[str] = set()  # keys that this process has verified
        self._has_warned = False  # whether an unusable file was logged
        self._closed = False  # whether storing has ended
        self._count()

    def get(self, key: str) -> list[Tensor] | None:
        """Return the tensors of a key; None if they are missing or incomplete."""
        path = self.path(key)
        try:
            tensors = restore_features(_read(path, key, is_first=key not in self._seen))
        except FileNotFoundError:
            return None
        except (OSError, SchemaError, UserError) as error:
            if not self._has_warned:
                log.warning("%s cannot be used (%s). Such features are recomputed.", path, error)
            self._has_warned = True
            return None
        self._seen.add(key)
        return tensors

    def put(self, key: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Store tensors if there is room, and return them as `get` would."""
        converted = _round_with_warning(tensors, self.stored)
        if not self._closed:
            try:
                self._write(self.path(key), to_bytes(key, converted))
            except IsADirectoryError:
                log.warning("%s is a folder: the features of one image are not cached. Remove it.", self.path(key))
            except OSError as error:
                self._closed = True
                full = f"the disk is full, {free_space(self.root)}" if error.errno in DISK_FULL else error
                _log_end(f"Cannot write features to {self.folder} ({full})")
        return restore_features(converted)

    @contextmanager
    def claim(self, key: str) -> Iterator[None]:
        """Let one process at a time compute a key within the block; the others wait, and then find its file.

        Runs that start together with one seed would otherwise all compute the same features. A process that hangs is
        not waited for longer than a minute, nor once a stop is requested: the block then computes the key, too.
        """
        lock = hold_lock(self.folder / f"{key}.lock", limit=_PATIENCE, notice=NOTICE, poll=_POLL, level=logging.DEBUG)
        with ExitStack() as stack:
            if not self._closed:
                try:
                    stack.enter_context(lock)
                except WaitEnded as error:
                    log.warning("%s The features are computed here.", error)
                except OSError:  # a cache that cannot be written: each run computes for itself
                    pass
            yield

    def trust(self, key: str) -> None:
        """Mark a key as verified: a worker of this process has read it."""
        self._seen.add(key)

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def room(self) -> int:
        """Return the bytes that can still be stored, including those of files that may be evicted."""
        return max(0, self._free() + sum(size for _, _, size in self._old()))

    def path(self, key: str) -> Path:
        """Return the path of a key's file, which need not exist."""
        return self.folder / f"{key}{_SUFFIX}"

    def _write(self, path: Path, content: bytes) -> None:
        if self._written > _STEP:
            self._count()
        if len(content) > (free := self._free()):
            self._remove_old(len(content) - free)
        if len(content) > (free := self._free()):
            self._closed = True
            cap = "" if self.cap is None else f", {in_bytes(self.cap)} at most"
            _log_end(f"{in_bytes(max(0, free))} are free in {self.root}{cap}")
            return
        with atomic_file(path) as part, open(part, "wb", buffering=0) as file:
            write_all(file, memoryview(content))
        self._used += len(content)
        self._written += len(content)
        self._seen.add(path.stem)

    def _free(self) -> int:
        """Return the bytes that can be written without eviction."""
        there = next(folder for folder in (self.root, *self.root.absolute().parents) if folder.exists())
        on_disk = shutil.disk_usage(there).free - _RESERVE
        return on_disk if self.cap is None else min(on_disk, self.cap - self._used)

    def _count(self) -> None:
        self._used, self._written = sum(status.st_size for _, status in self._files()), 0

    def _remove_old(self, needed: int) -> None:
        """Evict least-recently-used files, somewhat more than needed now; those of this run's own folder last."""
        self._count()
        enough, removed = needed + min(_STEP, (self.cap or sys.maxsize) // 16), 0
        for _, path, size in sorted(self._old()):
            if removed >= enough:
                break
            with suppress(OSError):
                path.unlink()
                removed += size
        self._used -= removed

    def _old(self) -> Iterator[tuple[tuple[bool, int], Path, int]]:
        """Yield eviction order, path and bytes of each file that was not used since this store was opened."""
        for path, status in self._files():
            if status.st_mtime_ns < self._opened:
                yield (path.parent == self.folder, status.st_mtime_ns), path, status.st_size

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.root.glob(f"*/*{_SUFFIX}"):
            with suppress(OSError):  # another process has just removed it
                status = path.lstat()
                if stat.S_ISREG(status.st_mode):
                    yield path, status


def cap_of(gib: Positive | None) -> int | None:
    """Convert GiB to bytes, at most `sys.maxsize`; None: no limit."""
    return None if gib is None else int(min(gib * 2**30, sys.maxsize))


def _read(path: Path, key: str, *, is_first: bool) -> list[Tensor]:
    """Return the tensors in a file; not memory-mapped, since reading a map of a truncated file kills the process.

    The first time, the file is verified and marked as used.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise SchemaError(f"it has {size} bytes")
        tensors = from_file(key, file, verify=is_first)
    if is_first:
        with suppress(OSError):  # a read-only cache
            os.utime(path)
    return tensors


def _round_with_warning(tensors: Sequence[Tensor], stored: Stored) -> list[Tensor]:
    converted = round_features(tensors, stored)
    if stored == "float16" and any(tensor.dtype == torch.bfloat16 for tensor in converted):
        _warn_of_wider()
    return converted


@cache
def _warn_of_wider() -> None:
    """Log the warning once per process."""
    log.warning(
        "Features of an image overflow in float16: such images are cached in bfloat16, which is coarser. "
        "features.dtype=float32 caches them exactly."
    )


def _log_end(reason: str) -> None:
    log.warning(
        "%s: no more features are cached. Features of other images are computed when needed. Free some space, and the "
        "next run caches more.",
        reason,
    )
