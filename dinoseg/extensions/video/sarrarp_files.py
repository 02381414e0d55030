"""File layout of SAR-RARP50; imports no torch, since every extraction process imports this module."""

from pathlib import Path

from dinoseg.utils import forms
from dinoseg.utils.files import entries

TRAIN_FOLDERS = ("train1", "train2", "train")
TEST_FOLDERS = ("test",)
FRAME_FOLDERS = ("rgb", "frames")  # of the official toolkit, and of an older layout
MASK_FOLDER = "segmentation"
VIDEO = "video_left.avi"
FRAMES_PER_SECOND = 60
PREPARED = ".prepared.json"  # in a video's folder: counts of mode=prepare
PREPARED_FORM = forms.record(rate=forms.whole(1), decoded=forms.whole(), frames=forms.whole(), masks=forms.whole())
MASK_STEP = 60  # every 60th frame has a mask: one per second


def frame_files(video: Path) -> dict[str, Path]:
    """Return stem to file of a video's extracted frames, or `{}` if there are none."""
    for name in FRAME_FOLDERS:
        if files := png_files(video / name):
            return files
    return {}


def prepared_frames(video: Path) -> int:
    """Return the number of frames that mode=prepare counted in a video, or 0 if it has not run."""
    try:
        return forms.read_json(video / PREPARED, PREPARED_FORM)["decoded"]
    except (OSError, forms.SchemaError):
        return 0


def png_files(folder: Path) -> dict[str, Path]:
    """Return stem to file of the PNG files in a folder, in order, without hidden ones."""
    return {path.stem: path for path in entries(folder) if path.suffix == ".png"}
