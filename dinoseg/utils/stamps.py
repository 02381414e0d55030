"""By what a file that has not changed is known again; imports the standard library alone."""

import os
from typing import Protocol

Stamp = tuple[int, int, int, int]


class HasStatus(Protocol):
    """A path, or anything else that lies in a file."""

    def stat(self) -> os.stat_result:
        """Return the file's status."""
        ...


def stamp(file: HasStatus) -> Stamp | None:
    """Return size, time of content, time of status and number of a file; None where there is none.

    Size and time of content are alike where files were unpacked or copied with their times; the other two are not.
    """
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
