"""Stamps that show whether a file has changed. Imports only the standard library."""

import os
from typing import Protocol

Stamp = tuple[int, int, int, int]


class HasStatus(Protocol):
    """A path, or another object with the status of a file."""

    def stat(self) -> os.stat_result:
        """Return the file's status."""
        ...


def stamp(file: HasStatus) -> Stamp | None:
    """Return size, modification time, status-change time and inode of a file; None if it does not exist.

    Size and modification time are equal for files that were unpacked or copied with their times; the other two are not.
    """
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
