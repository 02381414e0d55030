"""Parallel rendering of videos below one folder: finished videos are reused, other content is refused."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import cv2

from dinoseg.report.progress import Bar
from dinoseg.utils.errors import UserError
from dinoseg.utils.locks import hold_lock
from dinoseg.utils.workers import in_processes


class Rendered(Protocol):
    """Settings that determine one video's content; their description is stored with the finished video."""

    @property
    def description(self) -> Any:
        """All settings of the video."""
        ...

    def path(self, root: Path) -> Path:
        """Return the path of the finished video."""
        ...


Video = TypeVar("Video", bound=Rendered)
_LOCK = ".render.lock"  # in the root: one process renders at a time


def render_videos(
    root: Path, find: Callable[[], Sequence[Video]], write: Callable[[Video], Any], *, total: int, workers: int
) -> None:
    """Write the videos that `find` returns, out of `total`, with `workers` processes; a second run of one root waits.

    Raises:
        UserError: raised by `find`; or the disk is full or not writable.
    """
    try:
        with hold_lock(root / _LOCK):
            videos = find()
            with Bar(total=total, initial=total - len(videos), desc="render", unit="video") as bar:
                remedy = f"Set mode.workers below {workers} and run again to resume."
                for _ in in_processes(write, videos, workers, in_order=False, start=_use_one_thread, remedy=remedy):
                    bar.update()
    except OSError as error:
        raise UserError(
            f"Cannot write the videos to {root} ({error}). Choose a writable root with enough free space; running "
            "again renders the missing videos."
        ) from error


def find_missing(
    root: Path, videos: Iterable[Video], existing: Iterable[Path], description: Callable[[Path], Any], what: str
) -> list[Video]:
    """Return the videos that are not written yet.

    Args:
        root: folder of the videos.
        videos: all videos of this rendering.
        existing: paths found where videos are written.
        description: returns the description of a finished video.
        what: kind of a finished video, `file` or `folder`.

    Raises:
        UserError: an existing path is not one of these videos.
    """
    wanted = {video.path(root): video for video in videos}
    for path in existing:
        if path not in wanted or description(path) != wanted[path].description:
            raise UserError(
                f"{path} was not rendered with these settings by this version. Rendering does not overwrite it: choose "
                f"another root, or remove that {what}."
            )
    return [video for path, video in wanted.items() if not path.exists()]


def _use_one_thread() -> None:
    cv2.setNumThreads(1)
