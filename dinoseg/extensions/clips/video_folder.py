"""Reader of a folder of video files or frame folders, searched recursively; without masks."""

import logging
from dataclasses import dataclass
from pathlib import Path

from dinoseg.extensions.clips.videos import DecodedFrames, FrameFiles, Video
from dinoseg.extensions.video.index import index_videos
from dinoseg.extensions.video.length import VIDEO_SUFFIXES
from dinoseg.extensions.video.pictures import picture_files
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import natural_order, visible_files
from dinoseg.utils.images import IMAGE_SUFFIXES
from dinoseg.utils.ranges import OnError, Positive
from dinoseg.utils.wording import count_of, list_first

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VideoFolder:
    """Locations of videos: each video file, and each folder with image files, is one video.

    Names are paths below the folder, without file suffix.

    Args:
        root: folder that is searched.
        folder: subfolder to search, with `{split}` for the split.
        folder_fps: frame rate of frame folders, None if unknown; video files state their own.
        on_error: `stop`, or `skip`: video files that cannot be read are left out and logged.
        cache_dir: folder of the video files' frame indexes.
    """

    root: str
    folder: str = ""
    folder_fps: Positive | None = None
    on_error: OnError = "stop"
    cache_dir: str = "outputs/.cache"

    @property
    def split_local_names(self) -> bool:
        """Return whether each split has its own folder."""
        return "{split}" in self.folder

    def videos(self, split: str) -> list[Video]:
        """Return the videos of a split in natural order; decode each video file once to build its index.

        Raises:
            UserError: the folder does not exist or is empty, two videos have one name, or video files cannot be read.
        """
        top = Path(self.root).expanduser() / self.folder.replace("{split}", split)
        if not top.is_dir():
            raise UserError(f"No folder {top} for split {split}. Check data.root and data.folder.")
        paths = _search(top)
        if not paths:
            raise UserError(
                f"{top} holds no video: no file {', '.join(VIDEO_SUFFIXES)} and no folder of frames "
                f"({', '.join(IMAGE_SUFFIXES)}). Check data.root and data.folder."
            )
        cache_dir = Path(self.cache_dir)
        indexes, wrong = index_videos([path for path in paths.values() if path.is_file()], cache_dir)
        self._report(wrong, len(paths))
        videos = []
        for name, path in paths.items():
            if path.is_dir():
                frames = FrameFiles(path, list(picture_files(path).values()))
                videos.append(Video(name, frames, self.folder_fps))
            elif path in indexes:
                index = indexes[path]
                videos.append(
                    Video(name, DecodedFrames(path, len(index), cache_dir), index.fps if index.fps > 0 else None)
                )
        return videos

    def _report(self, wrong: dict[Path, str], total: int) -> None:
        if not wrong:
            return
        if self.on_error == "stop" or len(wrong) == total:
            raise UserError(
                f"{count_of(wrong, 'video')} of {total} cannot be read:{list_first([*wrong.values()])}\nTo leave such "
                "files out, set data.on_error=skip: the log then lists all."
            )
        lines = "".join(f"\n- {problem}" for problem in wrong.values())
        log.warning("data.on_error=skip: %d of %d videos are left out:%s", len(wrong), total, lines)


def _search(top: Path) -> dict[str, Path]:
    """Return name to video file or frame folder, in natural order."""
    paths: dict[str, Path] = {}
    for here, files in visible_files(top):
        shown = [Path(file) for file in files]
        candidates = [(here / file.stem, here / file) for file in shown if file.suffix.lower() in VIDEO_SUFFIXES]
        if any(file.suffix.lower() in IMAGE_SUFFIXES for file in shown):
            candidates.append((here, here))
        for unended, path in candidates:
            name = unended.relative_to(top).as_posix() if unended != top else top.name
            if name in paths:
                raise UserError(f"{paths[name]} and {path} have the same name ({name}): rename or remove one of them.")
            paths[name] = path
    return {name: paths[name] for name in sorted(paths, key=natural_order)}
