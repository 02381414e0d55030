"""Whether a picture file ends where it should, without decoding it.

Pillow's own `verify` finds a cut PNG or WebP file, and passes cut JPEG, BMP and plain TIFF files.
"""

import os
from pathlib import Path

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

_ENDS = {b"\x89PNG": b"IEND", b"\xff\xd8": b"\xff\xd9"}  # first bytes to end mark
_TAIL = 4096  # bytes in which an end mark is looked for: cameras append their own
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # first bytes, of the large kind too
_STRIPS, _TILES = (273, 279), (324, 325)  # TIFF tags: where the parts of a picture begin, and their bytes


def ends_early(path: Path) -> bool:
    """Return whether a file's end is not where its kind or its header says, as that of most truncated files.

    It costs two short reads; of TIFF files, those of the header.
    """
    with path.open("rb") as file:
        start = file.read(8)
        size = file.seek(0, os.SEEK_END)
        if mark := next((mark for magic, mark in _ENDS.items() if start.startswith(magic)), None):
            file.seek(max(0, size - _TAIL))
            return mark not in file.read()
    if start.startswith(b"BM"):
        promised = int.from_bytes(start[2:6], "little")
        return promised == 0 or size < promised  # some writers leave it at 0
    if start.startswith(b"RIFF"):
        return size < 8 + int.from_bytes(start[4:8], "little")
    return start.startswith(_TIFF) and size < _end_of_tiff(path)


def _end_of_tiff(path: Path) -> int:
    with Image.open(path, formats=("TIFF",)) as file:
        if not isinstance(file, TiffImageFile):
            return 0
        tags = file.tag_v2
        parts = [zip(tags.get(begin, ()), tags.get(count, ()), strict=False) for begin, count in (_STRIPS, _TILES)]
        return max((begin + count for part in parts for begin, count in part), default=0)
