"""Where SAR-RARP50 keeps what; imports no torch, since every extraction process starts with this."""

from pathlib import Path

TRAIN_FOLDERS = ("train1", "train2", "train")
TEST_FOLDERS = ("test",)
FRAME_FOLDERS = ("rgb", "frames")  # the official toolkit's, and an older layout's
MASK_FOLDER = "segmentation"
VIDEO = "video_left.avi"
FRAMES_PER_SECOND = 60
MASK_STEP = 60  # a mask for every 60th frame: one per second


def frame_files(video: Path) -> dict[str, Path]:
    """Return stem to file of a video's extracted frames, `{}` where there are none."""
    for name in FRAME_FOLDERS:
        if files := png_files(video / name):
            return files
    return {}


def png_files(folder: Path) -> dict[str, Path]:
    """Return stem to file of the PNG files in a folder, in order, without hidden ones."""
    return {path.stem: path for path in sorted(folder.glob("*.png")) if not path.name.startswith(".")}
