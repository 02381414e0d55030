"""A video through a model: decode | predict | write its overlay and masks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, takewhile
from pathlib import Path

import numpy as np

from dinoseg.images import write_png
from dinoseg.inference.frame_classes import FrameClasses
from dinoseg.inference.image_run import DEPTH, ImageRun, Segmentation
from dinoseg.inference.stream import Throughput, run_pipeline
from dinoseg.inference.video_file import VideoReader
from dinoseg.inference.video_writer import VideoWriter
from dinoseg.processes.interrupt import ending_input
from dinoseg.report.overlay import blend
from dinoseg.report.progress import Bar
from dinoseg.storage.atomic import whole_folder

_Frame = tuple[np.ndarray, Fraction | None]  # (H, W, 3), and when it is shown


@dataclass(frozen=True)
class VideoOptions:
    """How a video is segmented.

    Args:
        masks: whether the class ids of each frame are written, too.
        skip: every so manieth frame is predicted.
        smooth: share of the frames before in a frame's class probabilities, below 1.
        frames: at most so many; None: all.
    """

    masks: bool = False
    skip: int = 1
    smooth: float = 0.0
    frames: int | None = None


@dataclass(frozen=True)
class VideoInput:
    """A video to segment.

    Args:
        name: what its results are called.
        open: gives its frames.
        path: the file; None: a camera.
    """

    name: str
    open: Callable[[], VideoReader]
    path: Path | None = None


def segment_video(by: Segmentation, video: VideoInput, run: ImageRun, options: VideoOptions) -> Throughput | None:
    """Write NAME_overlay.mp4 and, if asked for, NAME_masks/%09d.png into a run's folder; None where both are done.

    The result counts frames. What a camera gives ends with a first signal, and is whole then.

    Raises:
        UserError: the video cannot be read to its end, or the disk is full; nothing of it is left then.
        OSError: a mask cannot be written.
    """
    target, masks = run.folder / f"{video.name}_overlay.mp4", run.folder / f"{video.name}_masks"
    results = [target, masks] if options.masks else [target]
    if video.path is not None and run.done.holds(video.name, video.path, results):
        return None
    classes = FrameClasses(by.predictor, skip=options.skip, smooth=options.smooth)
    with ExitStack() as stack:
        reader = stack.enter_context(video.open())
        folder = stack.enter_context(whole_folder(masks)) if options.masks else None
        cut = options.frames is not None
        writer = stack.enter_context(VideoWriter(target, reader.rate, reader.size, like=reader.traits, cut=cut))
        total = min(filter(None, (reader.count, options.frames)), default=None)
        bar = stack.enter_context(Bar(total=total, unit="frame", desc=reader.path.name))
        frames: Iterable[_Frame] = islice(reader.timed(), options.frames)
        if video.path is None:
            stop = stack.enter_context(ending_input())
            frames = takewhile(lambda _: not stop.asked, frames)

        def infer(batch: list[_Frame]) -> list[tuple[_Frame, np.ndarray]]:
            return list(zip(batch, classes.ids([frame for frame, _ in batch]), strict=True))

        def write(done: list[tuple[_Frame, np.ndarray]]) -> None:
            palette, ignored = by.labels.palette, by.labels.ignore_index
            for (frame, time), ids in done:
                if folder is not None:
                    write_png(folder / f"{writer.frames_written:09d}.png", ids)
                writer.write(blend(frame, ids, palette, ignore_index=ignored, opacity=by.opacity), time)
            bar.update(len(done))

        passed = run_pipeline(_batches(frames, by.batch_size), infer, write, depth=DEPTH)
    if video.path is not None:
        run.done.note(video.name)
    passed.items = writer.frames_written
    return passed


def _batches(frames: Iterable[_Frame], size: int) -> Iterator[list[_Frame]]:
    iterator = iter(frames)
    while batch := list(islice(iterator, size)):
        yield batch
