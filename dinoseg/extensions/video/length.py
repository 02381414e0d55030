"""Suffixes of video files, and their frame counts by header or by counting."""

from itertools import islice
from pathlib import Path

from dinoseg.utils.errors import UserError

VIDEO_SUFFIXES = (".avi", ".mp4", ".mov", ".m4v", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv")


def is_video(path: Path) -> bool:
    """Return whether the file has a video suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def promised_frames(path: Path) -> int:
    """Return the frame count by the header, which may be off by one or two; 0 if it is unknown or not a video."""
    return _frame_count(path, count=False)


def count_frames(path: Path) -> int:
    """Return the number of frames by decoding the whole file; 0 if it is not a video."""
    return _frame_count(path, count=True)


def has_more_packets(path: Path, most: int) -> bool:
    """Return whether a video has more than `most` packets in all its streams, without decoding any.

    Raises:
        UserError: it is not a file or not a video.
    """
    from dinoseg.extensions.video.decoder import Decoder

    with Decoder(path) as decoder:
        return sum(1 for _ in islice(decoder.packets(), most + 1)) > most


def _frame_count(path: Path, *, count: bool) -> int:
    from dinoseg.extensions.video.decoder import Decoder

    try:
        with Decoder(path) as decoder:
            return sum(1 for _ in iter(decoder.advance, False)) if count else decoder.declared_frames
    except (OSError, UserError):  # damaged from the first byte, or later
        return 0
