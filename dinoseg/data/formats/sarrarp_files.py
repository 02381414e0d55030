"""File layout of SAR-RARP50; imports no torch, since every extraction process imports this module."""

import zlib
from pathlib import Path

from dinoseg.utils import forms
from dinoseg.utils.files import check_regular, entries

TRAIN_FOLDERS = ("train1", "train2", "train")
TEST_FOLDERS = ("test",)
FRAME_FOLDERS = ("rgb", "frames")  # of the official toolkit, and of an older layout
MASK_FOLDER = "segmentation"
PSEUDO_FOLDER = "pseudo"  # labels of frames without a mask, propagated from masks, never annotated by hand
PSEUDO_FILE = "pseudo.json"  # its provenance file
VIDEO = "video_left.avi"
FRAMES_PER_SECOND = 60
PREPARED = ".prepared.json"  # in a video's folder: counts of mode=prepare
PREPARED_FORM = forms.record(rate=forms.whole(1), decoded=forms.whole(), frames=forms.whole(), masks=forms.whole())
PSEUDO_FORM = forms.record(
    what=forms.text,
    made_by=forms.table(forms.plain),
    kept=forms.table(forms.number(0, 1)),
    left_out=forms.table(forms.number(0, 1)),
)
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


def gaps(video: Path) -> list[list[Path]]:
    """Return the extracted frames from each mask to the next, both included, if there are frames in between."""
    frames = {int(stem): path for stem, path in frame_files(video).items() if stem.isdigit()}
    masks = {int(stem) for stem in png_files(video / MASK_FOLDER) if stem.isdigit()} & frames.keys()
    pairs = [(start, start + MASK_STEP) for start in sorted(masks) if start + MASK_STEP in masks]
    runs = [[frames[index] for index in sorted(frames) if start <= index <= end] for start, end in pairs]
    return [gap for gap in runs if len(gap) > 2]


def mask_sums(video: Path) -> dict[str, int]:
    """Return stem to checksum of a video's masks, to detect that pseudo-labels are out of date."""
    masks = png_files(video / MASK_FOLDER)
    for path in masks.values():
        check_regular(path)
    return {stem: zlib.crc32(path.read_bytes()) for stem, path in masks.items()}


def frames_sum(video: Path) -> int:
    """Return a checksum of the names and sizes in bytes of a video's extracted frames."""
    sizes = [(path.name, path.stat().st_size) for path in frame_files(video).values()]
    return zlib.crc32(repr(sizes).encode())


def png_files(folder: Path) -> dict[str, Path]:
    """Return stem to file of the PNG files in a folder, in order, without hidden ones."""
    return {path.stem: path for path in entries(folder) if path.suffix == ".png"}
