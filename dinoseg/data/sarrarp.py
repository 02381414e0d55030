"""SAR-RARP50: frames and masks of robot-assisted prostatectomies, from extracted frames or from the videos."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dinoseg.data.labels import Labels
from dinoseg.data.masks import Masks
from dinoseg.data.pairs import Pair, PairDataset
from dinoseg.data.sarrarp_files import (
    MASK_FOLDER,
    MASK_STEP,
    TEST_FOLDERS,
    TRAIN_FOLDERS,
    VIDEO,
    frame_files,
    png_files,
)
from dinoseg.data.splits import Partition, divide
from dinoseg.data.video_access import VideoFrame
from dinoseg.data.video_index import index_videos
from dinoseg.data.wording import count_of, listed
from dinoseg.errors import UserError

# the parts of one operation stay together: video_11_1 and video_11_2
BY_OPERATION = Partition(by="fraction", group="^(video_[^_/]+)")
FOLDERS = {"train": TRAIN_FOLDERS, "val": TRAIN_FOLDERS, "test": TEST_FOLDERS}
SOURCES = ("frames", "video")


def sar_rarp50(
    root: str | Path,
    split: str,
    *,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]] | None = None,
    ignore_index: int = 255,
    partition: Partition = BY_OPERATION,
    source: str = "frames",
    cache_dir: str | Path = "outputs/.cache",
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
        source: `frames`: extracted ones; `video`: straight from `video_left.avi`.
        cache_dir: where the videos' indexes are kept, for `video`.

    Raises:
        UserError: the folder is missing, not prepared yet, or a frame lacks its mask or a mask its frame;
            when an item is read: an unreadable file, differing sizes, ids without class.
    """
    if source not in SOURCES:
        raise UserError(f"data.source={source} is unknown. Choose one of {', '.join(SOURCES)}.")
    labels = Labels.of(classes, palette, ignore_index)
    root = Path(root).expanduser()
    places = find_videos(root, split, source)
    frames = _decodable(root, places, Path(cache_dir)) if source == "video" else _extracted(places)
    pairs = [pair for name in places for pair in _video_pairs(root, places[name], frames[name], source)]
    return PairDataset(pairs if split == "test" else divide(split, lambda _: pairs, partition), labels, Masks())


def find_videos(root: Path, split: str, source: str = "frames") -> dict[str, Path]:
    """Return video name to its folder, in order, for the folders of a split.

    Raises:
        UserError: there is no such split, no folder or no video, one of them twice, or one not prepared yet.
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
    _check_prepared(root, folders, places, source)
    if not places:
        raise UserError(
            f"{', '.join(map(str, folders))}: no folder video_* and no video_*.zip. Check data.root={root}."
        )
    return {name: places[name] for name in sorted(places)}


def prepare_command(root: Path) -> str:
    """Return the command that unpacks archives and extracts frames."""
    return f"python -m dinoseg mode=prepare data=sarrarp data.root={root}"


def _check_prepared(root: Path, folders: list[Path], places: Mapping[str, Path], source: str) -> None:
    archives = [path for folder in folders for path in sorted(folder.glob("*.zip"))]
    waiting, lack = sorted({path.stem for path in archives} - places.keys()), "still packed"
    if source == "frames":
        waiting += [name for name in sorted(places) if not frame_files(places[name])]
        lack = "without extracted frames"
    if waiting:
        raise UserError(
            f"{count_of(waiting, 'video')} under {root} {lack}: {listed(waiting)}. "
            f"Prepare the data set first: {prepare_command(root)}"
        )


def _extracted(places: Mapping[str, Path]) -> dict[str, Mapping[str, Path | VideoFrame]]:
    """Return each video's extracted frames."""
    return {name: dict(frame_files(place)) for name, place in places.items()}


def _decodable(root: Path, places: Mapping[str, Path], cache_dir: Path) -> dict[str, Mapping[str, Path | VideoFrame]]:
    """Return those frames of each video that have a mask or ought to have one."""
    videos = {name: place / VIDEO for name, place in places.items()}
    if absent := [name for name, video in videos.items() if not video.is_file()]:
        raise UserError(
            f"{count_of(absent, 'video')} under {root} without {VIDEO}, which data.source=video reads: "
            f"{listed(absent)}. Unpack their archives again, or use extracted frames: data.source=frames."
        )
    indexes, wrong = index_videos(list(videos.values()), cache_dir)
    if wrong:
        lines = "".join(f"\n- {problem}" for problem in wrong.values())
        raise UserError(f"{count_of(wrong, 'video')} of {len(videos)} cannot be read:{lines}")
    frames: dict[str, Mapping[str, Path | VideoFrame]] = {}
    for name, video in videos.items():
        count = len(indexes[video])
        masked = {int(stem) for stem in png_files(places[name] / MASK_FOLDER) if stem.isdigit()}
        due = sorted({*range(0, count, MASK_STEP), *(index for index in masked if index < count)})
        frames[name] = {f"{index:09d}": VideoFrame(video, index, cache_dir) for index in due}
    return frames


def _video_pairs(root: Path, video: Path, frames: Mapping[str, Path | VideoFrame], source: str) -> list[Pair]:
    masks = png_files(video / MASK_FOLDER)
    if bare := [stem for stem in frames if stem not in masks and _is_due(stem)]:
        raise UserError(
            f"{video} has {count_of(bare, 'frame')} without mask in {MASK_FOLDER}/: {listed(bare)}. "
            "Unpack the video's archive again, or remove the video."
        )
    lone = [stem for stem in masks if stem not in frames]
    if lone and source == "video":
        raise UserError(
            f"{video} has {count_of(lone, 'mask')} without frame in {VIDEO}: {listed(lone)}. The video is shorter "
            "than its masks, or they are another's: unpack its archive again."
        )
    if lone:
        raise UserError(
            f"{video} has {count_of(lone, 'mask')} without extracted frame: {listed(lone)}. "
            f"Extract them: {prepare_command(root)}"
        )
    return [Pair(f"{video.name}/{stem}", frames[stem], masks[stem]) for stem in masks]


def _is_due(stem: str) -> bool:
    return not stem.isdigit() or int(stem) % MASK_STEP == 0
