"""Lock files: one process at a time holds a lock, until it releases it or ends in any way."""

import contextlib
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dinoseg.utils.errors import WaitEnded
from dinoseg.utils.files import open_regular, open_to_append
from dinoseg.utils.waiting import Wait
from dinoseg.utils.wording import format_text

log = logging.getLogger(__name__)
_POLL = 0.2  # seconds between two attempts to lock a file
_LIMIT = 86400.0  # seconds to wait for a holder that hangs: packing or preparing a large dataset takes hours
_LOCK_OFFSET = 2**30  # byte that is locked on Windows, beyond any content that others may read
_held: set[IO[str]] = set()


def acquire(path: Path, *, wait: float = 0.0) -> IO[str] | None:
    """Lock a file, created if missing; return a handle for `release`, or None while another process holds the lock.

    Forked processes do not inherit the lock, so workers that outlive a killed process do not block others. On file
    systems without locks, a warning is logged and the file counts as locked.

    Args:
        path: of the lock file.
        wait: seconds to wait for another process, which is logged.

    Raises:
        OSError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _try_to_lock(path, logging.WARNING)
    if file is None and wait:
        with contextlib.suppress(WaitEnded):
            file = _wait_for_lock(path, "Another process", limit=wait)
    if file is not None:
        _held.add(file)
    return file


def release(file: IO[str]) -> None:
    """Release a lock."""
    _held.discard(file)
    file.close()


@contextlib.contextmanager
def hold_lock(
    path: Path,
    *,
    limit: float = _LIMIT,
    notice: float = 0.0,
    poll: float = _POLL,
    level: int = logging.WARNING,
) -> Iterator[None]:
    """Hold a lock file during the block, waiting for its current holder; the file is removed at the end.

    The file names its holder. The lock of a holder that was killed is free, so only one that hangs is waited for long.

    Args:
        path: of the lock file.
        limit: seconds to wait.
        notice: seconds after which the wait is logged.
        poll: seconds between two attempts.
        level: of the log record about a file system without locks.

    Raises:
        OSError: if the file cannot be written.
        WaitEnded: if the wait has reached its limit, or a stop is requested.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _wait_for_lock(path, limit=limit, notice=notice, poll=poll, level=level)
    _held.add(file)
    _write_holder(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        release(file)


def _wait_for_lock(
    path: Path,
    holder: str | None = None,
    *,
    limit: float,
    notice: float = 0.0,
    poll: float = _POLL,
    level: int = logging.WARNING,
) -> IO[str]:
    """Return the locked file; `holder`: subject of the log line, None if the file names it."""
    wait = Wait(
        lambda seconds: (
            f"{holder or _read_holder(path)} has locked {path}: waiting for it ({seconds:.0f} s so far, at most "
            f"{limit:g} s). End that process if it hangs."
        ),
        limit=limit,
        notice=notice,
    )
    while True:
        file = _try_to_lock(path, level)
        if file is not None:
            return file
        time.sleep(poll)
        wait.check()


def _write_holder(file: IO[str]) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock has no name
        os.ftruncate(file.fileno(), 0)  # of a holder that was killed
        os.write(file.fileno(), f"Process {os.getpid()} on {platform.node()}".encode())


def _read_holder(path: Path) -> str:
    with contextlib.suppress(OSError), open_regular(path) as file:
        return format_text(file.read(200).decode(errors="replace")) or "Another process"
    return "Another process"


def _try_to_lock(path: Path, level: int) -> IO[str] | None:
    """Return an open and locked file; None if another process holds its lock."""
    while True:
        file = open_to_append(path)
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
