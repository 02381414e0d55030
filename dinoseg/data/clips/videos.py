"""Videos as lists of frames, of which some have a mask of object ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from dinoseg.data.splits import Partition, divide
from dinoseg.data.video.access import ImageSource, VideoFrame, read_source, source_origin
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import entries
from dinoseg.utils.images import IMAGE_SUFFIXES, UNREAD_SUFFIXES, read_ids
from dinoseg.utils.natural_order import natural_order
from dinoseg.utils.wording import count_of, listed

VOID = 255  # in a mask: no object is known here


class FrameFiles(Sequence[Path]):
    """The picture files of a folder; their paths are made when asked for, since there may be very many."""

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self.folder, self.files = folder, files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index):
        return self.folder / self.files[index]


class DecodedFrames(Sequence[VideoFrame]):
    """The frames of a video file."""

    def __init__(self, path: Path, length: int, cache_dir: Path | None) -> None:
        self.path, self.length, self.cache_dir = path, length, cache_dir

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index):
        return VideoFrame(self.path, range(self.length)[index], self.cache_dir)


@dataclass(frozen=True, eq=False)
class Video:
    """A video and what is known of its objects.

    Args:
        name: unique inside the data set.
        frames: image files or frames of a video file.
        fps: frames per second, None where unknown.
        masks: position among the frames to mask file.
        grey: masks are 0 and, for the one object, any other number; else they hold object ids, and 255 is void.
        dense: every object is in every mask; else only in the mask of the frame in which it appears.
    """

    name: str
    frames: Sequence[ImageSource]
    fps: float | None = None
    masks: Mapping[int, Path] = field(default_factory=dict)
    grey: bool = False
    dense: bool = True

    @property
    def origin(self) -> str:
        """Return where the first frame lies."""
        return source_origin(self.frames[0])

    def frame_name(self, position: int) -> str:
        """Return a frame file's stem, or the number of a video file's frame."""
        frame = self.frames[position]
        return frame.stem if isinstance(frame, Path) else f"{frame.index:09d}"

    def image(self, position: int) -> np.ndarray:
        """Read a frame (H, W, 3) uint8."""
        return read_source(self.frames[position])

    def mask(self, position: int) -> np.ndarray | None:
        """Read a frame's object ids (H, W) uint8, 0 = background, 255 = void; None: it has no mask.

        Raises:
            UserError: the file is unreadable, a coloured picture, or holds ids above 255.
        """
        path = self.masks.get(position)
        if path is None:
            return None
        ids = one_channel(read_ids(path), path)
        if self.grey:
            return (ids != 0).astype(np.uint8)
        if ids.min() < 0 or ids.max() > VOID:
            raise UserError(f"{path} holds the object id {ids.max()}: ids go from 0 to 254, and {VOID} is void.")
        return ids.astype(np.uint8)


class VideoLayout(Protocol):
    """Where a data set keeps its videos.

    `split_local_names`: each split's folder names its own videos, so that one name in two splits means two videos.
    """

    @property
    def split_local_names(self) -> bool:
        """Return whether names are unique in a split alone."""
        ...

    def videos(self, split: str) -> list[Video]:
        """Return the videos of a split, in order."""
        ...


def chosen(layout: VideoLayout, split: str, partition: Partition) -> list[Video]:
    """Return the videos of a split: those of the data set's own, or a share of its training videos in their order.

    Raises:
        UserError: the split is empty, or the data set has no such way of splitting.
    """
    if partition.by == "lists":
        raise UserError(
            "data.reader.partition.by=lists: videos come with lists of their own. Choose folder (these) or fraction "
            "(a share of the training videos)."
        )
    by_share = partition.by == "fraction"
    divided = split in ("train", "val") and (by_share or partition.fold is not None)
    videos = (
        divide(split, lambda side: layout.videos("train" if by_share else side), partition)
        if split in ("train", "val")
        else layout.videos(split)
    )
    if not videos:
        raise UserError(f"Split {split} holds no video. Check data.root.")
    return sorted(videos, key=lambda video: natural_order(video.name)) if divided else videos


def video_folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, as their names are counted, without hidden ones."""
    return sorted((path for path in entries(folder) if path.is_dir()), key=lambda path: natural_order(path.name))


def picture_files(folder: Path) -> dict[str, str]:
    """Return stem to name of the picture files in a folder, as their stems are counted, without hidden ones.

    Raises:
        UserError: there is no such folder, two of its files have one stem, or one is of a kind that is not read.
    """
    names: dict[str, str] = {}
    if not folder.is_dir():
        raise UserError(f"No folder {folder}. Check data.root, and that the whole data set was unpacked.")
    paths = sorted(entries(folder), key=lambda path: (natural_order(path.stem), path.suffix))
    if unread := [path.name for path in paths if path.suffix.lower() in UNREAD_SUFFIXES]:
        raise UserError(
            f"{folder} holds {count_of(unread, 'file')} of kinds that are not read: {listed(unread)}. Convert them to "
            "PNG, or move them away."
        )
    for path in paths:
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        if path.stem in names:
            raise UserError(f"{folder / names[path.stem]} and {path} are one frame: keep one of them.")
        names[path.stem] = path.name
    return names


def frames_and_masks(images: Path, masks: Path) -> tuple[FrameFiles, dict[int, Path]]:
    """Return a video's frames and, by position, its masks.

    Raises:
        UserError: a folder is missing, there is no frame, or a mask has no frame.
    """
    files, labels = picture_files(images), picture_files(masks)
    if not files:
        raise UserError(f"{images} holds no frame ({', '.join(IMAGE_SUFFIXES)}). Unpack the data set again.")
    if lone := sorted(labels.keys() - files.keys()):
        raise UserError(
            f"{masks} has {count_of(lone, 'mask')} without frame in {images}: {listed(lone)}. "
            "Unpack the data set again."
        )
    return FrameFiles(images, list(files.values())), {
        position: masks / labels[stem] for position, stem in enumerate(files) if stem in labels
    }


def require_masks(video: str, frames: FrameFiles, masks: Mapping[int, Path]) -> None:
    """Refuse a video of which some frame has no mask."""
    if bare := [Path(file).stem for position, file in enumerate(frames.files) if position not in masks]:
        raise UserError(
            f"Video {video} has {count_of(bare, 'frame')} without mask: {listed(bare)}. Unpack the data set again."
        )


def one_channel(numbers: np.ndarray, path: Path) -> np.ndarray:
    """Return (H, W) of a grey or palette file, and of a picture with three equal channels.

    Raises:
        UserError: it is a coloured picture.
    """
    if numbers.ndim == 3:
        if not (numbers == numbers[..., :1]).all():
            raise UserError(
                f"{path} is a coloured picture, not object ids. Masks of videos are grey or palette files: was it "
                "converted? Unpack the data set again."
            )
        numbers = numbers[..., 0]
    return numbers
