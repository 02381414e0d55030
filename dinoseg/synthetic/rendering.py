"""Rendering many videos below one folder: several at once, those that are there already kept, nothing else mixed in."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import cv2

from dinoseg.report.progress import Bar
from dinoseg.utils.atomic import remove_parts
from dinoseg.utils.errors import UserError
from dinoseg.utils.locks import locked
from dinoseg.utils.workers import in_processes


class Rendered(Protocol):
    """What determines one video's content; its description is kept with the finished video."""

    @property
    def description(self) -> Any:
        """All of its settings."""
        ...

    def path(self, root: Path) -> Path:
        """Return where the finished video lies."""
        ...


Video = TypeVar("Video", bound=Rendered)
_LOCK = ".render.lock"  # in the root: one run at a time


def render_videos(
    root: Path, find: Callable[[], Sequence[Video]], write: Callable[[Video], Any], *, total: int, workers: int
) -> None:
    """Write those of `total` videos that `find` returns, `workers` at once; a second run of one root waits.

    Raises:
        UserError: as `find`; the disk is full or cannot be written.
    """
    try:
        with locked(root / _LOCK):
            remove_parts(root, "*/.*.part")
            videos = find()
            with Bar(total=total, initial=total - len(videos), desc="render", unit="video") as bar:
                remedy = f"Set mode.workers below {workers} and run again: it goes on."
                for _ in in_processes(write, videos, workers, in_order=False, start=_use_one_thread, remedy=remedy):
                    bar.update()
    except OSError as error:
        raise UserError(
            f"Cannot write the videos to {root} ({error}). Choose a writable root with enough free space; running "
            "again goes on with what is missing."
        ) from error


def missing(
    root: Path, videos: Iterable[Video], existing: Iterable[Path], description: Callable[[Path], Any], what: str
) -> list[Video]:
    """Return the videos still to be written.

    Args:
        root: below which they lie.
        videos: all.
        existing: what lies where videos do.
        description: of a finished one.
        what: a finished one is, `file` or `folder`.

    Raises:
        UserError: one of them is none of these videos.
    """
    wanted = {video.path(root): video for video in videos}
    for path in existing:
        if path not in wanted or description(path) != wanted[path].description:
            raise UserError(
                f"{path} is not a video of this rendering (other settings, or other data). Rendering does "
                f"not overwrite or mix: choose another root, or remove that {what}."
            )
    return [video for path, video in wanted.items() if not path.exists()]


def check_least(**settings: tuple[int, int]) -> None:
    """Refuse settings, each given with its least value, that are below it."""
    for name, (value, least) in settings.items():
        if value < least:
            raise UserError(f"{name}={value} is too small: give a whole number of at least {least}.")


def _use_one_thread() -> None:
    cv2.setNumThreads(1)
