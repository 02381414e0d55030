"""Clips: sequences of video frames with their masks, read one clip at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from dinoseg.data.splits import Partition
from dinoseg.extensions.clips.videos import VOID, Video, VideoLayout, select_split
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, NotNegative, Positive
from dinoseg.utils.wording import join_names


class Clip(TypedDict):
    """T frames of one video, all of one size."""

    frames: Tensor  # (T, 3, H, W) uint8, RGB
    masks: Tensor  # (T, H, W) uint8, object ids, 0 = background, 255 = void; all 255 if there is no mask
    annotated: Tensor  # (T,) bool: which frames have a mask
    appears: Tensor  # (255,) int64: object id to the first of the T frames whose mask has it, or -1
    name: str  # of the video
    start: int  # position of the first frame in the video
    stride: int  # positions from one frame to the next
    frame_names: list[str]  # file stems, or the frame indices of a video file


class ClipPosition(NamedTuple):
    """Position of a clip in its dataset."""

    video: int
    start: int
    stride: int
    length: int


@dataclass(frozen=True)
class Cut:
    """Rules for cutting videos into clips.

    Args:
        length: frames per clip; None: the whole video is one clip.
        stride: use every `stride`-th frame.
        fps: wanted frames per second, which determine the stride; None: use `stride`.
        fps_tolerance: maximum relative deviation from `fps` that results from a whole stride.
        step: video frames between the starts of successive clips; None: the frames that a clip covers, so that clips do
            not overlap. A remainder too short for a clip is dropped.
        per_video: number of clips per video, evenly spaced; None: all that fit.
        sample: each epoch, take one of a video's clips at random, not all of them; for training.
        short: treatment of a video with fewer frames than a clip covers. `error`; `skip`: it has no clip; `pad`: repeat
            its last frame, without a mask.
    """

    length: Count | None = None
    stride: Count = 1
    fps: Positive | None = None
    fps_tolerance: NotNegative = 0.05
    step: Count | None = None
    per_video: Count | None = None
    sample: bool = False
    short: Literal["error", "skip", "pad"] = "error"

    def __post_init__(self) -> None:
        """Reject contradictory options."""
        if self.fps is not None and self.stride != 1:
            raise UserError(f"fps={self.fps} and stride={self.stride} both set the frame rate: set one of them.")
        if self.length is None and self.step is not None:
            raise UserError(f"step={self.step} has no effect with length=null, the whole video: remove it.")
        if self.step is not None and self.per_video is not None:
            raise UserError(f"step={self.step} and per_video={self.per_video} both set where clips start: set one.")
        if self.sample and self.length is None:
            raise UserError(
                "sample=true has no effect with length=null, the whole video. Set a length, such as length=8."
            )

    def stride_of(self, video: Video) -> int:
        """Return the stride in frames for a video.

        Raises:
            UserError: the frame rate is unknown, or no whole stride is within `fps_tolerance` of `fps`.
        """
        if self.fps is None:
            return self.stride
        if video.fps is None:
            raise UserError(
                f"cut.fps={self.fps}, but the frame rate of video {video.name} is unknown. Set "
                "layout.folder_fps=NUMBER for folders of frames, or cut.stride=NUMBER instead."
            )
        stride = max(1, round(video.fps / self.fps))
        if abs(video.fps / stride / self.fps - 1) > self.fps_tolerance:
            rates = [f"{video.fps / each:.4g}" for each in range(max(1, stride - 1), stride + 2)]
            raise UserError(
                f"cut.fps={self.fps}: video {video.name} has {video.fps:.4g} frames per second; taking every n-th "
                f"frame gives {', '.join(rates)}. Choose one of these, set cut.stride=NUMBER, or raise the relative "
                f"tolerance cut.fps_tolerance={self.fps_tolerance}."
            )
        return stride

    def spans(self, number: int, video: Video) -> Iterator[ClipPosition]:
        """Yield the clips of a video; `number` is its index in the dataset.

        Raises:
            UserError: see `stride_of`; the video is too short, and `short` is `error`.
        """
        stride, count = self.stride_of(video), len(video.frames)
        length = self.length if self.length is not None else -(-count // stride)
        covered = (length - 1) * stride + 1
        step = self.step if self.step is not None else length * stride
        if count >= covered:
            room = count - covered
            starts = range(0, room + 1, step) if self.per_video is None else _spread(room, self.per_video)
            yield from (ClipPosition(number, start, stride, length) for start in starts)
        elif self.short == "pad":
            yield ClipPosition(number, 0, stride, length)
        elif self.short == "error":
            raise UserError(
                f"Video {video.name} has {count} frames; {length} at stride {stride} need {covered}. Set "
                f"cut.short=pad or skip, or lower cut.length={self.length} or cut.stride={stride}."
            )


class Clips:
    """Clips of some videos, in the order of the videos; `skipped` names the videos too short for a clip.

    With `cut.sample`, there is one per video.

    Raises:
        UserError: no video has a clip, or see `Cut`; when an item is read: an unreadable file, frames that differ in
            size, a mask whose size differs from its frame.
    """

    def __init__(self, videos: Sequence[Video], cut: Cut) -> None:
        self.videos, self.cut = videos, cut
        self.spans = [span for number, video in enumerate(videos) for span in cut.spans(number, video)]
        by_video: dict[int, list[ClipPosition]] = {}
        for span in self.spans:
            by_video.setdefault(span.video, []).append(span)
        self._choices = list(by_video.values()) if cut.sample else None  # clips of each video
        used = by_video.keys()
        self.skipped = [video.name for number, video in enumerate(videos) if number not in used]
        if not self.spans:
            raise UserError(
                f"All {len(videos)} videos are too short for a clip: {join_names(self.skipped)}. Set "
                f"cut.short=pad, or lower cut.length={cut.length}."
            )

    def __len__(self) -> int:
        return len(self.spans if self._choices is None else self._choices)

    def frames(self, index: int, rng: np.random.Generator | None = None) -> tuple[np.ndarray, str]:
        """Return the frames (T, H, W, 3) uint8 of a clip without their masks, and a name for it.

        With `cut.sample`, `index` is that of a video, and `rng` chooses one of its clips; None: the first.
        """
        video, span, positions = self._find(index, rng)
        return _read_frames(video, positions, span.length), f"{video.name}/{video.frame_name(span.start)}"

    def __getitem__(self, index: int) -> Clip:
        video, span, positions = self._find(index)
        masks: list[np.ndarray | None] = [video.mask(position) for position in positions]
        frames = _read_frames(video, positions, span.length)  # (T, H, W, 3)
        filled = np.full(frames.shape[:3], VOID, dtype=np.uint8)  # (T, H, W)
        for number, (position, mask) in enumerate(zip(positions, masks, strict=True)):
            if mask is None:
                continue
            if mask.shape != filled.shape[1:]:
                raise UserError(
                    f"{video.frames[position]} is {_size(frames[number])} (width x height), its mask "
                    f"{video.masks[position]} is {_size(mask)}. Replace the one that is wrong."
                )
            filled[number] = mask
        padded = span.length - len(positions)
        names = [video.frame_name(position) for position in positions]
        return Clip(
            frames=torch.from_numpy(frames).permute(0, 3, 1, 2),  # (T, 3, H, W)
            masks=torch.from_numpy(filled),
            annotated=torch.tensor([mask is not None for mask in masks] + [False] * padded),
            appears=torch.from_numpy(_first_frames(masks)),
            name=video.name,
            start=span.start,
            stride=span.stride,
            frame_names=names + names[-1:] * padded,
        )

    def _find(self, index: int, rng: np.random.Generator | None = None) -> tuple[Video, ClipPosition, list[int]]:
        """Return a clip's video, its span there, and the positions that exist in the video."""
        choices = [self.spans[index]] if self._choices is None else self._choices[index]
        span = choices[0 if rng is None else int(rng.integers(len(choices)))]
        video = self.videos[span.video]
        wanted = (span.start + number * span.stride for number in range(span.length))
        return video, span, [position for position in wanted if position < len(video.frames)]


def open_clips(
    layout: VideoLayout,
    split: str,
    *,
    cut: Cut = Cut(),  # noqa: B008 (frozen)
    eval_cut: Cut | None = None,
    eval_square: Count | None = None,
    partition: Partition = Partition(),  # noqa: B008 (frozen)
) -> Clips:
    """Return the clips of a split of a dataset.

    Args:
        layout: locations of the videos.
        split: train, val or test.
        cut: rules for train.
        eval_cut: rules for other splits; None: `cut`.
        eval_square: side in pixels of the centred square of frames and masks of other splits; None: whole frames.
        partition: rule that assigns videos to splits.

    Raises:
        UserError: any error of the layout, and see `Clips`.
    """
    videos = select_split(layout, split, partition)
    if split != "train":
        cut = replace(cut if eval_cut is None else eval_cut, sample=False)
        videos = [replace(video, square=eval_square) for video in videos]
    return Clips(videos, cut)


def _spread(room: int, count: int) -> list[int]:
    """Return the starts of at most `count` clips, evenly spaced from 0 to `room`; a single one is in the middle."""
    if count == 1:
        return [room // 2]
    return sorted({round(number * room / (count - 1)) for number in range(count)})


def _first_frames(masks: Sequence[np.ndarray | None]) -> np.ndarray:
    """Return, by object id, the index of the first mask that has it, or -1; the background is not an object."""
    first = np.full(VOID, -1, dtype=np.int64)
    for number, mask in enumerate(masks):
        if mask is not None:
            shown = np.bincount(mask.ravel(), minlength=VOID)[:VOID] > 0
            first[shown & (first < 0)] = number
    first[0] = -1
    return first


def _read_frames(video: Video, positions: Sequence[int], length: int) -> np.ndarray:
    """Read frames into (length, H, W, 3) uint8; positions missing at the end repeat the last frame."""
    first = video.image(positions[0])
    frames = np.empty((length, *first.shape), dtype=np.uint8)
    frames[0] = first
    for number, position in enumerate(positions[1:], start=1):
        image = video.image(position)
        if image.shape != first.shape:
            raise UserError(
                f"Frames of video {video.name} differ in size: {video.frames[positions[0]]} is {_size(first)} "
                f"(width x height), {video.frames[position]} is {_size(image)}. Make them equal."
            )
        frames[number] = image
    frames[len(positions) :] = frames[len(positions) - 1]
    return frames


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"
