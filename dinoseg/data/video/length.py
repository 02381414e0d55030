"""Which files are videos by their names, and how many frames they have: by their headers, or by counting."""

from itertools import islice
from pathlib import Path

from dinoseg.utils.errors import UserError

VIDEO_SUFFIXES = (".avi", ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv")


def promised_frames(path: Path) -> int:
    """Return what the header says, which may be off by a frame or two; 0 where it says nothing, or it is no video."""
    return _asked(path, count=False)


def count_frames(path: Path) -> int:
    """Return how many frames there are, by going through the whole file; 0 where it is no video."""
    return _asked(path, count=True)


def has_more_packets(path: Path, most: int) -> bool:
    """Return whether a video has more packets than so many, of all its streams, without decoding any.

    Raises:
        UserError: it is no file, or no video.
    """
    from dinoseg.data.video.decoder import Decoder

    with Decoder(path) as decoder:
        return sum(1 for _ in islice(decoder.packets(), most + 1)) > most


def _asked(path: Path, *, count: bool) -> int:
    from dinoseg.data.video.decoder import Decoder

    try:
        with Decoder(path) as decoder:
            return sum(1 for _ in iter(decoder.advance, False)) if count else decoder.promised
    except (OSError, UserError):  # damaged from its first byte, or further on
        return 0
