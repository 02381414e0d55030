"""Natural sort order of numbered names: frame2 before frame10."""

import re

# natsort, called folder by folder, sorts ASCII names in the same way and no faster; it sorts whole paths
# and other scripts' digits differently, and the order of frames must not depend on a library's version
_NUMBER = re.compile(r"([0-9]+)")


def natural_order(name: str) -> tuple:
    """Return a key for natural order: folder by folder, with runs of digits as numbers."""
    parts = tuple(
        tuple(int(piece) if index % 2 else piece for index, piece in enumerate(_NUMBER.split(part)))
        for part in name.split("/")
    )
    return parts, name  # tie-break: 01 and 1 are the same number
