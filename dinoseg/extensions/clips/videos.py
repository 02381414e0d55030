"""Videos as lists of frames, with masks of object ids for some frames."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from dinoseg.core.sources import read_source, source_origin
from dinoseg.data.splits import Partition, divide
from dinoseg.extensions.annotations.drawing import Drawing
from dinoseg.extensions.clips.square import square_frame, square_mask
from dinoseg.extensions.video.access import VideoFrame
from dinoseg.extensions.video.pictures import picture_files
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import entries, natural_order
from dinoseg.utils.images import IMAGE_SUFFIXES, read_ids, read_size
from dinoseg.utils.wording import count_of, join_names

VOID = 255  # mask value of pixels without a known object


class FrameFiles(Sequence[Path]):
    """Image files of a folder; paths are created on access, since there may be very many."""

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        self.folder, self.files = folder, files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index):
        return self.folder / self.files[index]


class DecodedFrames(Sequence[VideoFrame]):
    """Frames of a video file."""

    def __init__(self, path: Path, length: int, cache_dir: Path | None) -> None:
        self.path, self.length, self.cache_dir = path, length, cache_dir

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index):
        return VideoFrame(self.path, range(self.length)[index], self.cache_dir)


@dataclass(frozen=True, eq=False)
class Video:
    """Video with its object masks.

    Args:
        name: unique in the dataset.
        frames: image files or frames of a video file.
        fps: frames per second, None if unknown.
        masks: position among the frames to mask: a file, or a drawing of an annotation file.
        grey: masks hold 0 and, for the single object, any other number; otherwise they hold object ids, and 255 is
            void.
        dense: every mask shows every object; otherwise an object is only in the mask of the frame in which it first
            appears.
        square: crop frames and masks to the centred square and resize it to this side in pixels; None: unchanged.
    """

    name: str
    frames: Sequence[Path | VideoFrame]
    fps: float | None = None
    masks: Mapping[int, Path | Drawing] = field(default_factory=dict)
    grey: bool = False
    dense: bool = True
    square: int | None = None

    @property
    def origin(self) -> str:
        """Return the location of the first frame."""
        return source_origin(self.frames[0])

    @property
    def frame_names(self) -> list[str]:
        """Return the names of all frames."""
        return [self.frame_name(position) for position in range(len(self.frames))]

    def frame_name(self, position: int) -> str:
        """Return a frame file's stem, or the frame index in a video file."""
        frame = self.frames[position]
        return frame.stem if isinstance(frame, Path) else f"{frame.index:09d}"

    def image(self, position: int) -> np.ndarray:
        """Return a frame (H, W, 3) uint8.

        Raises:
            UserError: the frame is unreadable, or with `square` of another size than its mask.
        """
        frame = read_source(self.frames[position])
        if self.square is None:
            return frame
        self._check_size(position, frame.shape[:2])
        return square_frame(frame, self.square)

    def mask(self, position: int) -> np.ndarray | None:
        """Return a frame's object ids (H, W) uint8, 0 = background, 255 = void, or None if it has no mask.

        Raises:
            UserError: the file is unreadable, a colour image, or holds ids above 255.
        """
        source = self.masks.get(position)
        if source is None:
            return None
        ids = source.read() if isinstance(source, Drawing) else self._ids(source)
        return ids if self.square is None else square_mask(ids, self.square)

    def check_size(self, position: int) -> None:
        """Refuse a frame file whose header has another size than its mask; nothing is decoded.

        Raises:
            UserError: the sizes differ, or the file is no image.
        """
        frame = self.frames[position]
        if isinstance(frame, Path):
            self._check_size(position, read_size(frame))

    def _check_size(self, position: int, size: tuple[int, ...]) -> None:
        """Refuse a frame (H, W) of another size than its mask, as long as both are whole."""
        mask = self.masks.get(position)
        if mask is None:
            return
        expected = mask.size if isinstance(mask, Drawing) else read_size(mask)
        if tuple(expected) != tuple(size):
            raise UserError(
                f"{self.frames[position]} is {size[1]} x {size[0]} (width x height), its mask {mask} is "
                f"{expected[1]} x {expected[0]}. Replace the one that is wrong."
            )

    def _ids(self, path: Path) -> np.ndarray:
        ids = one_channel(read_ids(path), path)
        if self.grey:
            return (ids != 0).astype(np.uint8)
        if ids.min() < 0 or ids.max() > VOID:
            raise UserError(f"{path} holds the object id {ids.max()}: ids go from 0 to 254, and {VOID} is void.")
        return ids.astype(np.uint8)


class VideoLayout(Protocol):
    """Locations of a dataset's videos.

    `split_local_names`: names are unique per split only, so one name in two splits refers to two videos.
    """

    @property
    def split_local_names(self) -> bool:
        """Return whether names are unique only within a split."""
        ...

    def videos(self, split: str) -> list[Video]:
        """Return the videos of a split, in order."""
        ...


def select_split(layout: VideoLayout, split: str, partition: Partition) -> list[Video]:
    """Return the videos of a split: of the dataset's own split, or a share of its training videos in their order.

    Raises:
        UserError: the split is empty, or the dataset does not support this kind of partition.
    """
    if partition.by == "lists":
        raise UserError(
            "data.reader.partition.by=lists: video datasets have their own lists. Choose folder (those lists) or "
            "fraction (a share of the training videos)."
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
    """Return the subfolders of a folder in natural order, without hidden ones."""
    return sorted((path for path in entries(folder) if path.is_dir()), key=lambda path: natural_order(path.name))


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
            f"{masks} has {count_of(lone, 'mask')} without frame in {images}: {join_names(lone)}. "
            "Unpack the data set again."
        )
    return FrameFiles(images, list(files.values())), {
        position: masks / labels[stem] for position, stem in enumerate(files) if stem in labels
    }


def require_masks(video: str, frames: FrameFiles, masks: Mapping[int, Path]) -> None:
    """Raise a UserError if any frame of a video has no mask."""
    if bare := [Path(file).stem for position, file in enumerate(frames.files) if position not in masks]:
        raise UserError(
            f"Video {video} has {count_of(bare, 'frame')} without mask: {join_names(bare)}. Unpack the data set again."
        )


def one_channel(numbers: np.ndarray, path: Path) -> np.ndarray:
    """Return (H, W) of a grey or palette image, or of an image with three equal channels.

    Raises:
        UserError: it is a colour image.
    """
    if numbers.ndim == 3:
        if not (numbers == numbers[..., :1]).all():
            raise UserError(
                f"{path} is a colour image, not object ids. Masks of videos are grey or palette files: was it "
                "converted? Unpack the data set again."
            )
        numbers = numbers[..., 0]
    return numbers
