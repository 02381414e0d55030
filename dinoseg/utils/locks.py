"""Lock files: one process at a time holds a lock, until it releases it or ends in any way."""

import contextlib
import errno
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)
_POLL = 0.2  # seconds between two attempts to lock a file
_LOCK_OFFSET = 2**30  # byte that is locked on Windows, beyond any content that others may read
_held: set[IO[str]] = set()


def acquire(path: Path, *, wait: float = 0.0, poll: float = _POLL, level: int = logging.WARNING) -> IO[str] | None:
    """Lock a file, created if missing; return a handle for `release`, or None while another process holds the lock.

    Forked processes do not inherit the lock, so workers that outlive a killed process do not block others. On file
    systems without locks, a warning is logged and the file counts as locked.

    Args:
        path: of the lock file.
        wait: seconds to wait for another process, which is logged.
        poll: seconds between two attempts.
        level: of the log records.

    Raises:
        OSError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait
    file = _try_to_lock(path, level)
    if file is None and wait:
        log.log(level, "Another process has locked %s: waiting for it.", path)
    while file is None and time.monotonic() < deadline:
        time.sleep(poll)
        file = _try_to_lock(path, level)
    if file is not None:
        _held.add(file)
    return file


def release(file: IO[str]) -> None:
    """Release a lock."""
    _held.discard(file)
    file.close()


@contextlib.contextmanager
def hold_lock(path: Path, *, poll: float = _POLL, level: int = logging.WARNING) -> Iterator[None]:
    """Hold a lock file during the block, waiting for its current holder; the file is removed at the end.

    Args:
        path: of the lock file.
        poll: seconds between two attempts.
        level: of the log record about waiting.

    Raises:
        OSError: if the file cannot be written.
    """
    file = acquire(path, wait=math.inf, poll=poll, level=level)
    assert file is not None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        release(file)


def _try_to_lock(path: Path, level: int) -> IO[str] | None:
    """Return an open and locked file; None if another process holds its lock."""
    while True:
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        file = open(path, "a", encoding="utf-8")
        try:
            _lock(file)
        except (BlockingIOError, PermissionError):  # of flock and of msvcrt
            file.close()
            return None
        except OSError as error:
            log.log(level, "%s cannot be locked (%s): start one process at a time.", path, error.strerror)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the previous holder has removed this file


def _lock(file: IO[str]) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file.fileno(), _LOCK_OFFSET, os.SEEK_SET)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _close_locks() -> None:
    for file in _held:
        file.close()
    _held.clear()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_locks)
