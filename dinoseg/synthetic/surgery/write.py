"""Writer for rendered operations in the download format of SAR-RARP50: zipped videos with 1 Hz masks."""

import functools
import json
import os
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np

from dinoseg.synthetic.rendering import check_least, missing, render_videos
from dinoseg.synthetic.surgery.scene import RATE, render_clip
from dinoseg.utils.atomic import scratch_folder
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Natural

FPS = 60
SPLITS = ("train1", "test")
FIRST_TEST_VIDEO = 41  # as in SAR-RARP50


@dataclass(frozen=True)
class SurgeryVideo:
    """Settings that determine one video's content; stored as the comment of its zip."""

    seed: int
    split: str
    number: int
    seconds: int
    size: tuple[int, int]

    @property
    def description(self) -> bytes:
        """The description stored in the finished zip."""
        return b"dinoseg render " + json.dumps(asdict(self)).encode()

    def path(self, root: Path) -> Path:
        """Return the path of the finished zip."""
        return root / self.split / f"video_{self.number:02d}.zip"


def render_dataset(
    root: Path,
    *,
    train_videos: Natural = 64,
    test_videos: Natural = 2,
    seconds: Count = 4,
    size: tuple[int, int] = (192, 320),
    seed: Natural = 0,
    workers: Count = 2,
) -> None:
    """Write `root/train1/video_*.zip` and `root/test/video_*.zip`, several videos in parallel.

    Each zip holds `video_left.avi` (60 fps, `size` (H, W)) and `segmentation/%09d.png` for every 60th frame. Zips
    finished by an earlier call with the same settings are reused; zips are written atomically.

    Raises:
        UserError: a setting is out of range, or `root` is not writable or holds other videos.
    """
    root, size = Path(root), (int(size[0]), int(size[1]))
    _check_sizes(train_videos, test_videos, seconds, size, seed, workers)
    first_test = max(FIRST_TEST_VIDEO, train_videos + 1)
    numbers = {"train1": range(1, train_videos + 1), "test": range(first_test, first_test + test_videos)}
    videos = [SurgeryVideo(seed, split, number, seconds, size) for split in SPLITS for number in numbers[split]]
    work = functools.partial(_write_video, root=root)
    render_videos(root, functools.partial(_missing, root, videos), work, total=len(videos), workers=workers)


def _check_sizes(
    train_videos: int, test_videos: int, seconds: int, size: tuple[int, int], seed: int, workers: int
) -> None:
    if train_videos < 0 or test_videos < 0 or train_videos + test_videos == 0:
        raise UserError(
            f"train_videos={train_videos} and test_videos={test_videos} give no videos to render. "
            "Neither may be negative and one must be at least 1."
        )
    if min(size) < 16 or size[0] % 2 or size[1] % 2:
        raise UserError(
            f"size={list(size)} cannot be a video's (height, width): both must be even and at least 16. "
            "Take for example [192, 320]."
        )
    check_least(seconds=(seconds, 1), workers=(workers, 1), seed=(seed, 0))


def _missing(root: Path, videos: list[SurgeryVideo]) -> list[SurgeryVideo]:
    """Return the videos that are not written yet, and refuse a root with other content."""
    for split in SPLITS:
        (root / split).mkdir(parents=True, exist_ok=True)
    existing = [path for split in SPLITS for path in sorted((root / split).glob("*.zip"))]
    return missing(root, videos, existing, _comment, "file")


def _comment(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.comment
    except zipfile.BadZipFile:
        return b""


def _write_video(video: SurgeryVideo, root: Path) -> Path:
    """Render one video in a scratch folder next to its target, then move the finished zip there."""
    path = video.path(root)
    with scratch_folder(path.parent, path.name) as part:
        entropy = (video.seed, SPLITS.index(video.split), video.number)
        clip = render_clip(entropy, video.seconds * RATE, video.size)
        masks = _encode(part / "video_left.avi", clip, video.size)
        _pack(part / path.name, part / "video_left.avi", masks, video.description)
        os.replace(part / path.name, path)
    return path


def _encode(path: Path, clip: Iterable[tuple[np.ndarray, np.ndarray]], size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Write the frames at 60 fps; return the masks of every 60th frame by file name."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"XVID"), FPS, size[::-1])
    if not writer.isOpened():
        raise UserError(f"OpenCV {cv2.__version__} cannot encode XVID here. Install opencv-python-headless from PyPI.")
    masks = {}
    repeats = FPS // RATE
    try:
        for index, (rgb, mask) in enumerate(clip):
            if index * repeats % FPS == 0:
                masks[f"segmentation/{index * repeats:09d}.png"] = mask
            bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
            for _ in range(repeats):
                writer.write(bgr)
    finally:
        writer.release()
    return masks


def _pack(path: Path, video: Path, masks: dict[str, np.ndarray], comment: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(video, video.name)
        for name, mask in masks.items():
            archive.writestr(name, cv2.imencode(".png", mask)[1].tobytes())
        archive.comment = comment
