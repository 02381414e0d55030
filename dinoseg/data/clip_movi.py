"""MOVi as folders of frames: {train,validation,test}/<video>/frames and segmentations."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dinoseg.data.clip_videos import Video, frames_and_masks, require_masks, video_folders
from dinoseg.errors import UserError
from dinoseg.wording import listed

FRAMES_PER_SECOND = 12


@dataclass(frozen=True)
class Movi:
    """Where the written-out videos lie: `<split>/<video>/frames/*.png|jpg` and `segmentations/*.png` of the same stems.

    A segmentation holds 0 for the background and k for the video's k-th instance.

    Args:
        root: folder with the splits.
        splits: split to its folder.
    """

    root: str
    splits: Mapping[str, str] = field(default_factory=lambda: {"val": "validation"})

    def videos(self, split: str) -> list[Video]:
        """Return the videos of a split.

        Raises:
            UserError: a folder is missing, or frames and segmentations do not belong together.
        """
        folder = Path(self.root).expanduser() / self.splits.get(split, split)
        if not folder.is_dir():
            held = sorted(path.name for path in folder.parent.glob("[!.]*")) or ["nothing"]
            raise UserError(f"No folder {folder} for split {split}; beside it lies {listed(held)}. Check data.root.")
        return [self._video(place) for place in video_folders(folder)]

    def _video(self, place: Path) -> Video:
        frames, masks = frames_and_masks(place / "frames", place / "segmentations")
        require_masks(place.name, frames, masks)
        return Video(place.name, frames, FRAMES_PER_SECOND, masks)
