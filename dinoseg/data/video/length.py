"""Which files are videos by their names, and how many frames they have: by their headers, or by counting."""

from pathlib import Path

from dinoseg.data.video.decoder import Decoder
from dinoseg.errors import UserError

VIDEO_SUFFIXES = (".avi", ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv")


def promised_frames(path: Path) -> int:
    """Return what the header says, which may be off by a frame or two; 0 where it says nothing, or it is no video."""
    return _asked(path, count=False)


def count_frames(path: Path) -> int:
    """Return how many frames there are, by going through the whole file; 0 where it is no video."""
    return _asked(path, count=True)


def _asked(path: Path, *, count: bool) -> int:
    try:
        decoder = Decoder(path)
    except (OSError, UserError):
        return 0
    try:
        return sum(1 for _ in iter(decoder.advance, False)) if count else decoder.promised
    finally:
        decoder.close()
