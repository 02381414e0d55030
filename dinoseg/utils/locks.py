"""Lock files: one process at a time holds a lock, until it releases it or ends in any way."""

import contextlib
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dinoseg.utils.errors import WaitEnded
from dinoseg.utils.files import open_regular, open_to_append
from dinoseg.utils.waiting import Wait

log = logging.getLogger(__name__)
_POLL = 0.2  # seconds between two attempts to lock a file
_ALIVE = 10.0  # seconds between two signs of life of a holder
_LIFELESS = 600.0  # seconds without a sign of life after which others stop waiting: ending them costs more than waiting
_LOCK_OFFSET = 2**30  # byte that is locked on Windows, beyond any content that others may read
_held: set[IO[str]] = set()
_alive: set[Path] = set()  # lock files whose modification time shows that this process is alive
_heart: threading.Thread | None = None


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
            file = _wait_for_lock(path, limit=wait, notice=0.0, poll=_POLL, level=logging.WARNING)
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
    limit: float | None = None,
    notice: float = 0.0,
    poll: float = _POLL,
    level: int = logging.WARNING,
) -> Iterator[None]:
    """Hold a lock file during the block, waiting for its current holder; the file is removed at the end.

    The file names its holder, which modifies it every 10 s to show that it is alive.

    Args:
        path: of the lock file.
        limit: seconds to wait; None: until the holder has shown no sign of life for 10 minutes.
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
    _show_life(path)
    try:
        yield
    finally:
        _alive.discard(path)
        with contextlib.suppress(OSError):
            path.unlink()
        release(file)


def _wait_for_lock(path: Path, *, limit: float | None, notice: float, poll: float, level: int) -> IO[str]:
    wait = Wait(
        lambda seconds: (
            f"{_read_holder(path)} has locked {path}: waiting for it ({seconds:.0f} s so far). End that process if it "
            "hangs."
        ),
        limit=_LIFELESS if limit is None else limit,
        notice=notice,
    )
    sign = _life_sign(path)
    while True:
        file = _try_to_lock(path, level)
        if file is not None:
            return file
        time.sleep(poll)
        if limit is None and _life_sign(path) != sign:
            sign = _life_sign(path)
            wait.note_progress()
        wait.check()


def _write_holder(file: IO[str]) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock has no name
        os.ftruncate(file.fileno(), 0)  # of a holder that was killed
        os.write(file.fileno(), f"Process {os.getpid()} on {platform.node()}".encode())


def _read_holder(path: Path) -> str:
    with contextlib.suppress(OSError), open_regular(path) as file:
        return file.read(200).decode(errors="replace") or "Another process"
    return "Another process"


def _life_sign(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _show_life(path: Path) -> None:
    """Modify a lock file from time to time while it is in `_alive`; one thread does so for all of this process."""
    global _heart
    _alive.add(path)
    if _heart is None:
        _heart = threading.Thread(target=_beat, name="dinoseg locks", daemon=True)
        _heart.start()


def _beat() -> None:
    while True:
        time.sleep(_ALIVE)
        for path in list(_alive):
            with contextlib.suppress(OSError):
                os.utime(path)


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
    """Release in a forked process what its parent holds; the parent's thread does not exist there."""
    global _heart
    for file in _held:
        file.close()
    _held.clear()
    _alive.clear()
    _heart = None


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_locks)
