"""Disk speed: a file is written to disk and read back from it, not from the page cache."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dinoseg.utils.atomic import sync_to_disk


def seconds_on_disk(path: Path, write: Callable[[], object], read: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds to write a file, and to read it from the disk itself.

    Args:
        path: of the file, which is not removed.
        write: writes it.
        read: reads it.

    Raises:
        OSError: if the file cannot be written, or `write` did not create it.
    """
    start = time.perf_counter()
    write()
    sync_to_disk(path)
    written = time.perf_counter() - start
    if sys.platform == "linux":  # drop the file from the page cache
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    read()
    return written, time.perf_counter() - start
