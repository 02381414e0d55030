"""Video segmentation pipeline: decode frames, predict, and write overlay, masks and other outputs."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoseg.inference.image_run import DEPTH, ImageRun, SegmentationSettings
from dinoseg.inference.image_writers import frame_writer
from dinoseg.inference.memory import check_frames
from dinoseg.inference.outputs import ImagePrediction
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.stream import Throughput, run_pipeline
from dinoseg.inference.video_file import VideoReader
from dinoseg.inference.video_writer import VideoWriter
from dinoseg.report.overlay import blend
from dinoseg.report.progress import Bar
from dinoseg.utils.atomic import atomic_folder
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png

_Frame = tuple[np.ndarray, Fraction | None]  # (H, W, 3), and its timestamp


@dataclass(frozen=True)
class VideoOptions:
    """Options of video segmentation.

    Args:
        masks: whether to write the class IDs of each frame.
        skip: predict every n-th frame.
        smooth: weight of the previous frames in a frame's class probabilities, below 1.
        frames: maximum number of frames; None: all.
        outputs: further outputs per frame, validated by `check_frame_outputs`.
    """

    masks: bool = False
    skip: int = 1
    smooth: float = 0.0
    frames: int | None = None
    outputs: Sequence[str] = ()


@dataclass(frozen=True)
class VideoInput:
    """Video to segment.

    Args:
        name: prefix of its result files.
        path: the file.
    """

    name: str
    path: Path


def check_any(videos: Sequence[VideoInput], batch_size: int) -> None:
    """Check that at least one video can be segmented; this needs no model.

    Raises:
        UserError: no video can be segmented; the message states the reason for each.
    """
    failures: list[str] = []
    for video in videos:
        try:
            _open(video, batch_size).close()
            return
        except UserError as error:
            failures.append(str(error))
    raise UserError("\n".join(failures))


def segment_video(
    by: SegmentationSettings, video: VideoInput, run: ImageRun, options: VideoOptions
) -> Throughput | None:
    """Write NAME_overlay.mp4 and the other outputs of a video to the run folder; return None if it was already done.

    Class IDs are written to NAME_masks/%09d.png, other outputs to NAME_palette and so on. The returned throughput
    counts frames.

    Raises:
        UserError: the video cannot be read to its end, or the disk is full; partial results are deleted.
        OSError: a mask cannot be written.
    """
    target = run.folder / f"{video.name}_overlay.mp4"
    folders = {name: run.folder / f"{video.name}_{name}" for name in (*["masks"] * options.masks, *options.outputs)}
    if run.done.holds(video.name, video.path, [target, *folders.values()]):
        return None
    with ExitStack() as stack:
        reader = stack.enter_context(_open(video, by.batch_size))
        parts = {name: stack.enter_context(atomic_folder(folder)) for name, folder in folders.items()}
        masks = parts.pop("masks", None)
        writers = [frame_writer(name, part, by.labels) for name, part in parts.items()]
        needs_probabilities = any(writer.needs_probabilities for writer in writers)
        classes = FrameClasses(
            by.predictor, skip=options.skip, smooth=options.smooth, probabilities=needs_probabilities
        )
        writer = stack.enter_context(VideoWriter(target, reader.rate, reader.size, like=reader.traits))
        total = min(filter(None, (reader.count, options.frames)), default=None)
        bar = stack.enter_context(Bar(total=total, unit="frame", desc=reader.path.name))
        frames: Iterable[_Frame] = islice(reader.timed(), options.frames)

        def infer(batch: list[_Frame]) -> list[tuple[_Frame, FramePrediction]]:
            return list(zip(batch, classes.of([frame for frame, _ in batch]), strict=True))

        def write(done: list[tuple[_Frame, FramePrediction]]) -> None:
            palette, ignored = by.labels.palette, by.labels.ignore_index
            for (frame, time), seen in done:
                shown = ImagePrediction(f"{writer.frames_written:09d}", reader.path, frame, *seen)
                if masks is not None:
                    write_png(masks / f"{shown.name}.png", seen.ids)
                for further in writers:
                    further.write(shown)
                writer.write(blend(frame, seen.ids, palette, ignore_index=ignored, opacity=by.opacity), time)
            bar.update(len(done))

        passed = run_pipeline(_batches(frames, by.batch_size), infer, write, depth=DEPTH)
    run.done.note(video.name)
    passed.items = writer.frames_written
    return passed


def _open(video: VideoInput, batch_size: int) -> VideoReader:
    reader = VideoReader(video.path)
    try:
        check_frames(reader.path, reader.size, (2 * DEPTH + 3) * batch_size)  # queues and stages
    except UserError:
        reader.close()
        raise
    return reader


def _batches(frames: Iterable[_Frame], size: int) -> Iterator[list[_Frame]]:
    iterator = iter(frames)
    while batch := list(islice(iterator, size)):
        yield batch


class FramePrediction(NamedTuple):
    """Result of a frame: class IDs (H, W) uint8, and probabilities (K, H, W) on the device if requested."""

    ids: np.ndarray
    probabilities: Tensor | None


class FrameClasses:
    """Class predictions for the consecutive frames of one video.

    With `smooth`, class probabilities p are averaged over predicted frames: m = smooth * m + (1 - smooth) * p, where m
    starts as p of the first frame. The class is the argmax of m. This needs all probabilities in memory: K float32
    numbers per pixel, for a batch and for m.

    Args:
        predictor: predictor of the trained model.
        skip: predict every n-th frame, starting with the first; the frames between repeat the last result.
        smooth: weight of the previous frames, at least 0 and below 1; 0: frames are independent.
        probabilities: whether to return probabilities; with `smooth`, these are m.
    """

    def __init__(
        self, predictor: Predictor, *, skip: int = 1, smooth: float = 0.0, probabilities: bool = False
    ) -> None:
        self._predictor, self._skip, self._smooth, self._keeps = predictor, skip, smooth, probabilities
        self._count = 0
        self._mean: Tensor | None = None  # (K, H, W)
        self._held: FramePrediction | None = None

    def of(self, frames: Sequence[np.ndarray]) -> list[FramePrediction]:
        """Return the results of the next frames (H, W, 3) uint8 RGB."""
        due = [(self._count + index) % self._skip == 0 for index in range(len(frames))]
        predicted = iter(self._predicted([frame for frame, is_due in zip(frames, due, strict=True) if is_due]))
        shown = []
        for is_due in due:
            self._held = next(predicted) if is_due else self._held
            assert self._held is not None
            shown.append(self._held)
        self._count += len(frames)
        return shown

    def _predicted(self, frames: Sequence[np.ndarray]) -> list[FramePrediction]:
        if not frames:
            return []
        if not (self._smooth or self._keeps):
            return [FramePrediction(ids, None) for ids in self._predictor.ids(frames)]
        seen = []
        for shares in self._predictor.probabilities(frames):
            if self._smooth:
                # in this argument order, constant probabilities stay bit-identical
                shares = shares if self._mean is None else torch.lerp(self._mean, shares, 1 - self._smooth)
                self._mean = shares
            ids = shares.max(dim=0).indices.to(torch.uint8).cpu().numpy()
            seen.append(FramePrediction(ids, shares if self._keeps else None))
        return seen
