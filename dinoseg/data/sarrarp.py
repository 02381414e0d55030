"""SAR-RARP50: frames and masks of robot-assisted prostatectomies, in the official layout or `frames/`."""

from collections.abc import Sequence
from pathlib import Path

from dinoseg.data.labels import Labels
from dinoseg.data.masks import Masks
from dinoseg.data.pairs import Pair, PairDataset
from dinoseg.data.sarrarp_files import (
    MASK_FOLDER,
    MASK_STEP,
    TEST_FOLDERS,
    TRAIN_FOLDERS,
    frame_files,
    png_files,
)
from dinoseg.data.splits import Partition, divide
from dinoseg.data.wording import count_of, listed
from dinoseg.errors import UserError

# the parts of one operation stay together: video_11_1 and video_11_2
BY_OPERATION = Partition(by="fraction", group="^(video_[^_/]+)")
FOLDERS = {"train": TRAIN_FOLDERS, "val": TRAIN_FOLDERS, "test": TEST_FOLDERS}


def sar_rarp50(
    root: str | Path,
    split: str,
    *,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]] | None = None,
    ignore_index: int = 255,
    partition: Partition = BY_OPERATION,
) -> PairDataset:
    """Return the frames that have a mask, with names `video_XX/NNNNNNNNN` (the index in the 60 fps video).

    `train` and `val` split the training videos by operation; `test` is the test folder.

    Args:
        root: folder with `train1` and `train2` (or `train`), and `test`.
        split: `train`, `val` or `test`.
        classes: names in id order.
        palette: a colour per class, or None for default colours.
        ignore_index: id that is ignored.
        partition: how the training videos are divided into `train` and `val`; its names are `video_XX/NNNNNNNNN`.

    Raises:
        UserError: the folder is missing, not prepared yet, or a frame lacks its mask or a mask its frame;
            when an item is read: an unreadable file, differing sizes, ids without class.
    """
    labels = Labels.of(classes, palette, ignore_index)
    videos = find_videos(Path(root).expanduser(), split)
    pairs = [pair for name in sorted(videos) for pair in videos[name]]
    return PairDataset(pairs if split == "test" else divide(split, lambda _: pairs, partition), labels, Masks())


def find_videos(root: Path, split: str) -> dict[str, list[Pair]]:
    """Return video name to its frames with masks, in order, for the folders of a split.

    Raises:
        UserError: see `sar_rarp50`.
    """
    if split not in FOLDERS:
        raise UserError(f"SAR-RARP50 has the splits {', '.join(FOLDERS)}, not {split}.")
    folders = [root / name for name in FOLDERS[split] if (root / name).is_dir()]
    if not folders:
        raise UserError(
            f"data.root={root} holds none of the folders {', '.join(FOLDERS[split])} of split {split}. Give "
            "the folder into which SAR-RARP50 was downloaded."
        )
    places: dict[str, Path] = {}
    for video in (path for folder in folders for path in sorted(folder.glob("video_*")) if path.is_dir()):
        if video.name in places:
            raise UserError(f"{places[video.name]} and {video} are one video: keep one of them.")
        places[video.name] = video
    _check_prepared(root, folders, places)
    return {name: _video_pairs(root, places[name]) for name in sorted(places)}


def prepare_command(root: Path) -> str:
    """Return the command that unpacks archives and extracts frames."""
    return f"python -m dinoseg mode=prepare data=sarrarp data.root={root}"


def _check_prepared(root: Path, folders: list[Path], places: dict[str, Path]) -> None:
    archives = [path for folder in folders for path in sorted(folder.glob("*.zip"))]
    waiting = sorted({path.stem for path in archives} - places.keys())
    waiting += [name for name in sorted(places) if not frame_files(places[name])]
    if waiting:
        raise UserError(
            f"{count_of(waiting, 'video')} under {root} without extracted frames: {listed(waiting)}. "
            f"Prepare the data set first: {prepare_command(root)}"
        )
    if not places:
        raise UserError(
            f"{', '.join(map(str, folders))}: no folder video_* and no video_*.zip. Check data.root={root}."
        )


def _video_pairs(root: Path, video: Path) -> list[Pair]:
    frames, masks = frame_files(video), png_files(video / MASK_FOLDER)
    if bare := [stem for stem in frames if stem not in masks and _is_due(stem)]:
        raise UserError(
            f"{video} has {count_of(bare, 'frame')} without mask in {MASK_FOLDER}/: {listed(bare)}. "
            "Unpack the video's archive again, or remove the video."
        )
    if lone := [stem for stem in masks if stem not in frames]:
        raise UserError(
            f"{video} has {count_of(lone, 'mask')} without extracted frame: {listed(lone)}. "
            f"Extract them: {prepare_command(root)}"
        )
    return [Pair(f"{video.name}/{stem}", frames[stem], masks[stem]) for stem in masks]


def _is_due(stem: str) -> bool:
    return not stem.isdigit() or int(stem) % MASK_STEP == 0
