"""Writer for videos of moving objects: folders of frames and masks that `dinoseg.data.formats.movi` reads as MOVi."""

import functools
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dinoseg.synthetic.moving.objects import RATE, draw_video
from dinoseg.synthetic.rendering import check_least, missing, render_videos
from dinoseg.utils.atomic import whole_folder
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png
from dinoseg.utils.ranges import Count, Natural
from dinoseg.utils.wording import listed

FOLDERS = ("train", "validation", "test")
PICTURES = ("frames", "segmentations")  # subfolders of each video
DESCRIPTION = "rendering.json"  # inside each finished video
log = logging.getLogger(__name__)
_SMALLEST = 32  # pixels: smaller frames could leave objects without pixels


@dataclass(frozen=True)
class MovingVideo:
    """Settings that determine one video's content; stored in its folder."""

    seed: int
    folder: str
    number: int
    seconds: int
    size: tuple[int, int]

    @property
    def description(self) -> str:
        """The text stored in the finished folder."""
        return json.dumps({"dinoseg": "moving objects", **asdict(self)}, indent=1)

    def path(self, root: Path) -> Path:
        """Return the path of the finished video; names are unique across folders."""
        return root / self.folder / f"{self.folder}_{self.number:04d}"


def render_moving_objects(
    root: str | Path,
    *,
    train_videos: Natural = 512,
    val_videos: Natural = 64,
    test_videos: Natural = 0,
    seconds: Count = 2,
    size: Sequence[int] = (128, 128),
    seed: Natural = 0,
    workers: Count = 2,
) -> None:
    """Write `root/{train,validation,test}/<video>/{frames,segmentations}/%05d.png`, several videos in parallel.

    Videos have 12 frames per second of `size` (H, W). Masks are greyscale: 0 = ground, k = the video's k-th object.
    Videos finished by an earlier call with the same settings are reused; videos are written atomically. No two seeds
    or folders share a video.

    Raises:
        UserError: a setting is out of range, or `root` is not writable or holds other data.
    """
    root, counts = Path(root).expanduser(), (train_videos, val_videos, test_videos)
    _check_sizes(counts, seconds, size, seed, workers)
    videos = [
        MovingVideo(seed, folder, number, seconds, (size[0], size[1]))
        for folder, count in zip(FOLDERS, counts, strict=True)
        for number in range(1, count + 1)
    ]
    work = functools.partial(_write_video, root=root)
    render_videos(root, functools.partial(_missing, root, videos), work, total=len(videos), workers=workers)


def _check_sizes(counts: tuple[int, int, int], seconds: int, size: Sequence[int], seed: int, workers: int) -> None:
    if min(counts) < 0 or sum(counts) == 0:
        raise UserError(
            f"train_videos={counts[0]}, val_videos={counts[1]} and test_videos={counts[2]} give no videos to render. "
            "None may be negative and one must be at least 1."
        )
    if len(size) != 2 or min(size) < _SMALLEST:
        raise UserError(
            f"size={list(size)} cannot be a frame's [height, width]: both must be at least {_SMALLEST}. "
            "Take for example [128, 128]."
        )
    check_least(seconds=(seconds, 1), workers=(workers, 1), seed=(seed, 0))


def _missing(root: Path, videos: list[MovingVideo]) -> list[MovingVideo]:
    """Return the videos that are not written yet, and refuse a root with other content.

    A video with missing images is deleted and counts as missing.
    """
    foreign = [path.name for path in _shown(root) if path.name not in FOLDERS]
    if foreign:
        raise UserError(
            f"{root} holds {listed(foreign)}, which was not rendered by this command. Choose another root: rendering "
            "does not write into folders with other data."
        )
    existing = [path for folder in FOLDERS for path in _shown(root / folder)]
    absent = missing(root, videos, existing, _description, "folder")
    cut = [video for video in videos if video not in absent and not _is_whole(video, video.path(root))]
    for video in cut:
        log.warning("%s lacks images: rendering it again.", video.path(root))
        shutil.rmtree(video.path(root))
    return [*absent, *cut]


def _is_whole(video: MovingVideo, path: Path) -> bool:
    return all(len(_shown(path / folder)) >= video.seconds * RATE for folder in PICTURES)


def _shown(folder: Path) -> list[Path]:
    """Return the visible entries of a folder, or an empty list if it does not exist."""
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.exists() else []


def _description(path: Path) -> str:
    try:
        return (path / DESCRIPTION).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return ""


def _write_video(video: MovingVideo, root: Path) -> Path:
    """Render one video into its folder, which appears when it is finished."""
    path = video.path(root)
    with whole_folder(path) as part:
        entropy = (video.seed, FOLDERS.index(video.folder), video.number)
        for index, (rgb, mask) in enumerate(draw_video(entropy, video.seconds * RATE, video.size)):
            for folder, pixels in zip(PICTURES, (rgb, mask), strict=True):
                write_png(part / folder / f"{index:05d}.png", pixels)
        (part / DESCRIPTION).write_text(video.description, encoding="utf-8")
    return path
