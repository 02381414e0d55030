"""By what a file, and the way it is read, are known again; imports no torch."""

import json
import os
from dataclasses import fields
from typing import Protocol

from dinoseg.data.classes.masks import MaskReader

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


def rules_of(reader: MaskReader) -> str:
    """Return all that class ids depend on beside their file, as one text for equal rules, however written."""
    labels, masks = reader.labels, reader.masks
    options = {each.name: getattr(masks, each.name) or None for each in fields(masks) if each.compare}
    if masks.others is None:
        del options["others"]  # what was kept before there was this key stays known
    return json.dumps([labels.classes, labels.ignore_index, labels.palette, options], sort_keys=True)
