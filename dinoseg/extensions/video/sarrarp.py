"""Reader of SAR-RARP50: robot-assisted prostatectomies, from extracted frames or directly from the videos."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from dinoseg.core.sources import ImageSource
from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import Masks
from dinoseg.data.pairs.dataset import IncompletePair, PairDataset, collect_pairs
from dinoseg.data.pairs.pair import Pair
from dinoseg.data.splits import Partition, divide
from dinoseg.extensions.video.access import VideoFrame
from dinoseg.extensions.video.index import index_videos
from dinoseg.extensions.video.sarrarp_files import (
    MASK_FOLDER,
    MASK_STEP,
    TEST_FOLDERS,
    TRAIN_FOLDERS,
    VIDEO,
    frame_files,
    png_files,
)
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import entries

# the parts of one operation stay together: video_11_1 and video_11_2
BY_OPERATION = Partition(by="fraction", group="^(video_[^_/]+)")
FOLDERS = {"train": TRAIN_FOLDERS, "val": TRAIN_FOLDERS, "test": TEST_FOLDERS}
Frames = Mapping[str, ImageSource]  # stem to frame
_UNPACK = "Unpack the archives of these videos again, or remove the videos."


def sar_rarp50(
    root: str | Path,
    split: str,
    *,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]] | None = None,
    ignore_index: int = 255,
    partition: Partition = BY_OPERATION,
    source: Literal["frames", "video"] = "frames",
    cache_dir: str | Path = "outputs/.cache",
) -> PairDataset:
    """Return the frames that have a mask, named `video_XX/NNNNNNNNN` (the index in the 60 fps video).

    `train` and `val` split the training videos by operation; `test` is the test folder.

    Args:
        root: folder with `train1` and `train2` (or `train`), and `test`.
        split: `train`, `val` or `test`.
        classes: names in id order.
        palette: one colour per class, or None for default colours.
        ignore_index: id that is ignored.
        partition: rule that splits the training videos into `train` and `val`; it sees the names `video_XX/NNNNNNNNN`.
        source: `frames`: extracted frames; `video`: directly from `video_left.avi`.
        cache_dir: folder of the videos' frame indexes, for `video`.

    Raises:
        UserError: the folder is missing, or no frame has its mask, such as before `mode=prepare`; when an item is read:
            an unreadable file, differing sizes, ids without class.
    """
    labels = Labels.of(classes, palette, ignore_index)
    root = Path(root).expanduser()
    video_folders, packed = find_videos(root, split)
    if source == "video":
        frames, unusable = _select_decodable(video_folders, Path(cache_dir))
    else:
        frames, unusable = _find_frames(root, video_folders)
    pairs: list[Pair | IncompletePair] = [*packed, *unusable]
    for name in frames:
        pairs += _video_pairs(root, video_folders[name], frames[name], source)
    chosen = pairs if split == "test" else divide(split, lambda _: pairs, partition)
    return collect_pairs(chosen, split, labels, Masks())


def find_videos(root: Path, split: str) -> tuple[dict[str, Path], list[IncompletePair]]:
    """Return video name to folder, in order, for the folders of a split, and the videos that are still zipped.

    Raises:
        UserError: the split is unknown, has no folder or no video, or a video exists twice.
    """
    if split not in FOLDERS:
        raise UserError(f"SAR-RARP50 has the splits {', '.join(FOLDERS)}, not {split}.")
    folders = [root / name for name in FOLDERS[split] if (root / name).is_dir()]
    if not folders:
        raise UserError(
            f"data.root={root} lacks the folders {', '.join(FOLDERS[split])} of split {split}. Give the folder into "
            "which SAR-RARP50 was downloaded."
        )
    video_folders: dict[str, Path] = {}
    contents = [path for folder in folders for path in entries(folder)]
    for video in (path for path in contents if path.name.startswith("video_") and path.is_dir()):
        if video.name in video_folders:
            raise UserError(f"{video_folders[video.name]} and {video} are the same video: keep one of them.")
        video_folders[video.name] = video
    archives = {path.stem: path for path in contents if path.suffix == ".zip"}
    packed = [
        _video_lacking(name, f"{archives[name]} is not unpacked.", _to_prepare(root))
        for name in sorted(archives.keys() - video_folders.keys())
    ]
    if not video_folders and not packed:
        raise UserError(
            f"{', '.join(map(str, folders))}: no folder video_* and no video_*.zip. Check data.root={root}."
        )
    return {name: video_folders[name] for name in sorted(video_folders)}, packed


def prepare_command(root: Path) -> str:
    """Return the command that unpacks archives and extracts frames."""
    return f"python -m dinoseg mode=prepare data=sarrarp {shlex.quote(f'data.root={root}')}"


def _to_prepare(root: Path) -> str:
    return f"Prepare the data set first: {prepare_command(root)}"


def _video_lacking(video: str, reason: str, remedy: str) -> IncompletePair:
    """Return the `IncompletePair` of an unusable video; the split treats it like the video's first frame."""
    return IncompletePair(f"{video}/{0:09d}", reason, remedy, title=video)


def _find_frames(root: Path, video_folders: Mapping[str, Path]) -> tuple[dict[str, Frames], list[IncompletePair]]:
    """Return each video's extracted frames, and the videos without any."""
    frames: dict[str, Frames] = {name: dict(frame_files(folder)) for name, folder in video_folders.items()}
    bare = [name for name in video_folders if not frames[name]]
    lacking = [
        _video_lacking(name, f"{video_folders[name]} has no extracted frames.", _to_prepare(root)) for name in bare
    ]
    return {name: files for name, files in frames.items() if files}, lacking


def _select_decodable(
    video_folders: Mapping[str, Path], cache_dir: Path
) -> tuple[dict[str, Frames], list[IncompletePair]]:
    """Return the frames of each video that have or should have a mask, and the videos that cannot be read."""
    videos = {name: folder / VIDEO for name, folder in video_folders.items()}
    indexes, wrong = index_videos([video for video in videos.values() if video.is_file()], cache_dir)
    frames: dict[str, Frames] = {}
    lacking = []
    for name, video in videos.items():
        if video not in indexes:
            missing = f"{video_folders[name]} has no {VIDEO}, which data.source=video reads."
            remedy = "Unpack the archives of these videos again, or use extracted frames: data.source=frames."
            lacking.append(_video_lacking(name, wrong.get(video, missing), remedy))
            continue
        count = len(indexes[video])
        masked = {int(stem) for stem in png_files(video_folders[name] / MASK_FOLDER) if stem.isdigit()}
        due = sorted({*range(0, count, MASK_STEP), *(index for index in masked if index < count)})
        frames[name] = {f"{index:09d}": VideoFrame(video, index, cache_dir) for index in due}
    return frames, lacking


def _video_pairs(root: Path, video: Path, frames: Frames, source: str) -> Iterator[Pair | IncompletePair]:
    masks = png_files(video / MASK_FOLDER)
    for stem in (stem for stem in frames if stem not in masks and _is_due(stem)):
        yield IncompletePair(f"{video.name}/{stem}", f"{frames[stem]} has no mask in {video / MASK_FOLDER}.", _UNPACK)
    for stem, mask in masks.items():
        name = f"{video.name}/{stem}"
        if stem in frames:
            yield Pair(name, frames[stem], mask)
        elif source == "video":
            reason = (
                f"{mask} has no frame in {VIDEO}: the video is shorter than its masks, or the masks belong to "
                "another video."
            )
            yield IncompletePair(name, reason, _UNPACK)
        else:
            yield IncompletePair(name, f"{mask} has no extracted frame.", f"Extract them: {prepare_command(root)}")


def _is_due(stem: str) -> bool:
    return not stem.isdigit() or int(stem) % MASK_STEP == 0
