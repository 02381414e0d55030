"""Video segmentation pipeline: decode frames, predict, and write overlay, masks and other outputs."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from itertools import islice

import numpy as np

from dinoseg.extensions.video.length import VIDEO_SUFFIXES
from dinoseg.extensions.video.prediction import VideoReader
from dinoseg.extensions.video.writer import VideoWriter
from dinoseg.inference.image_run import DEPTH, ImageRun, SegmentationSettings
from dinoseg.inference.memory import check_frames
from dinoseg.inference.outputs import ImagePrediction, frame_writer
from dinoseg.inference.predictor import PixelsAndObjects
from dinoseg.inference.stream import Throughput, run_pipeline
from dinoseg.inference.videos import VideoInput, VideoOptions, VideoSegmenter
from dinoseg.report.overlay import blend
from dinoseg.report.progress import Bar
from dinoseg.utils.atomic import atomic_folder
from dinoseg.utils.errors import UserError
from dinoseg.utils.mask_files import write_masks

_Frame = tuple[np.ndarray, Fraction | None]  # (H, W, 3), and its timestamp


class VideoFiles(VideoSegmenter):
    """Video files as inputs of mode=predict."""

    suffixes = VIDEO_SUFFIXES

    def check(self, videos: Sequence[VideoInput], batch_size: int) -> None:
        """Check that at least one video can be segmented; see `check_any`."""
        check_any(videos, batch_size)

    def segment(
        self, settings: SegmentationSettings, video: VideoInput, run: ImageRun, options: VideoOptions
    ) -> Throughput | None:
        """Write the results of a video; see `segment_video`."""
        return segment_video(settings, video, run, options)


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
    settings: SegmentationSettings, video: VideoInput, run: ImageRun, options: VideoOptions
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
        reader = stack.enter_context(_open(video, settings.batch_size))
        parts = {name: stack.enter_context(atomic_folder(folder)) for name, folder in folders.items()}
        masks = parts.pop("masks", None)
        writers = [frame_writer(name, part, settings.labels) for name, part in parts.items()]
        needs_probabilities = any(writer.needs_probabilities for writer in writers)
        writer = stack.enter_context(VideoWriter(target, reader.rate, reader.size, like=reader.traits))
        total = min(filter(None, (reader.count, options.frames)), default=None)
        bar = stack.enter_context(Bar(total=total, unit="frame", desc=reader.path.name))
        frames: Iterable[_Frame] = islice(reader.timed_frames(), options.frames)

        def infer(batch: list[_Frame]) -> list[tuple[_Frame, PixelsAndObjects]]:
            images = [frame for frame, _ in batch]
            results = settings.predictor.predict(images, probabilities=needs_probabilities)
            return list(zip(batch, results, strict=True))

        def write(done: list[tuple[_Frame, PixelsAndObjects]]) -> None:
            palette, ignored = settings.labels.palette, settings.labels.ignore_index
            for (frame, time), result in done:
                shown = ImagePrediction(f"{writer.frames_written:09d}", reader.path, frame, *result)
                if masks is not None:
                    write_masks(masks, shown.name, shown.ids, settings.layers)
                for further in writers:
                    further.write(shown)
                writer.write(blend(frame, shown.ids, palette, ignore_index=ignored, opacity=settings.opacity), time)
            bar.update(len(done))

        throughput = run_pipeline(_batches(frames, settings.batch_size), infer, write, depth=DEPTH)
    run.done.note(video.name)
    throughput.items = writer.frames_written
    return throughput


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
