"""The order of numbered names: frame2 before frame10."""

import re

# natsort's keys, made folder by folder, order ASCII names alike and no faster; whole paths, and digits of other
# scripts, they order in other ways, and the order of frames must not hang on a library's version
_NUMBER = re.compile(r"([0-9]+)")


def natural_order(name: str) -> tuple:
    """Return the key by which names sort as they are counted: folder by folder, runs of digits as numbers."""
    parts = tuple(
        tuple(int(piece) if index % 2 else piece for index, piece in enumerate(_NUMBER.split(part)))
        for part in name.split("/")
    )
    return parts, name  # 01 and 1 are one number
