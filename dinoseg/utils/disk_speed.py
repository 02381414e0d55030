"""How fast a disk is: a file is written to it and read back from it, not from what the system holds of it."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dinoseg.utils.atomic import sync_to_disk


def seconds_on_disk(path: Path, write: Callable[[], object], read: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that a file takes to be written, and to be read from the disk itself.

    Args:
        path: of the file, which stays.
        write: makes it.
        read: reads it.

    Raises:
        OSError: it cannot be written, or was not.
    """
    start = time.perf_counter()
    write()
    sync_to_disk(path)
    written = time.perf_counter() - start
    if sys.platform == "linux":  # the system forgets what it holds of the file
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    read()
    return written, time.perf_counter() - start
