"""Reader of MOVi as folders of frames: {train,validation,test}/<video>/{frames,segmentations} or .../{rgb,seg}/<video>.

The folder of split `val` may also be named `val`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from dinoseg.extensions.clips.videos import Video, frames_and_masks, require_masks, video_folders
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import join_names

FRAMES_PER_SECOND = 12
_VALIDATION = "validation"


@dataclass(frozen=True)
class Movi:
    """Locations of exported videos, whose frames and segmentations have the same stems.

    Either `<split>/<video>/frames/*.png|jpg` and `segmentations/*.png`, or `<split>/rgb/<video>/*.png|jpg` and
    `seg/<video>/*.png`. A segmentation holds 0 for the background and k for the video's k-th instance.

    Args:
        root: folder with the splits.
        splits: split to its folder.
    """

    root: str
    splits: Mapping[str, str] = field(default_factory=lambda: {"val": _VALIDATION})
    split_local_names: ClassVar[bool] = True  # the usual export numbers the videos of each split from 0

    def videos(self, split: str) -> list[Video]:
        """Return the videos of a split.

        Raises:
            UserError: a folder is missing, or frames and segmentations do not match.
        """
        root = Path(self.root).expanduser()
        folder = root / self.splits.get(split, split)
        if not folder.is_dir() and folder.name == _VALIDATION and (root / split).is_dir():
            folder = root / split
        if not folder.is_dir():
            contents = sorted(path.name for path in folder.parent.glob("[!.]*")) or ["nothing"]
            raise UserError(
                f"No folder {folder} for split {split}; its parent folder holds {join_names(contents)}. Check "
                "data.root."
            )
        rgb = folder / "rgb"
        if rgb.is_dir() and not (rgb / "frames").is_dir():  # otherwise `rgb` is a video of that name
            return [_video(video.name, video, folder / "seg" / video.name) for video in video_folders(rgb)]
        return [_video(video.name, video / "frames", video / "segmentations") for video in video_folders(folder)]


def _video(name: str, images: Path, segmentations: Path) -> Video:
    frames, masks = frames_and_masks(images, segmentations)
    require_masks(name, frames, masks)
    return Video(name, frames, FRAMES_PER_SECOND, masks)
