"""A video through a model: decode | predict | write its overlay and masks."""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import numpy as np

from dinoseg.images import write_png
from dinoseg.inference.image_run import DEPTH, Segmentation
from dinoseg.inference.stream import run_pipeline
from dinoseg.inference.video_file import VideoReader, VideoWriter
from dinoseg.report.overlay import blend
from dinoseg.report.progress import Bar
from dinoseg.storage.atomic import whole_folder


def segment_video(by: Segmentation, path: Path, out: Path, name: str, *, masks: bool) -> tuple[int, float]:
    """Write `out`/NAME_overlay.mp4 and, with `masks`, NAME_masks/%09d.png; return the frames and the seconds taken.

    Raises:
        UserError: the video cannot be read to its end, or the disk is full; nothing of it is left then.
        OSError: a mask cannot be written.
    """
    start = time.perf_counter()
    with ExitStack() as stack:
        reader = stack.enter_context(VideoReader(path))
        folder = stack.enter_context(whole_folder(out / f"{name}_masks")) if masks else None
        writer = stack.enter_context(VideoWriter(out / f"{name}_overlay.mp4", reader.fps, reader.size))
        bar = stack.enter_context(Bar(total=reader.count or None, unit="frame", desc=path.name))

        def infer(frames: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
            return frames, by.predictor.ids(frames)

        def write(done: tuple[list[np.ndarray], np.ndarray]) -> None:
            palette, ignored = by.labels.palette, by.labels.ignore_index
            for frame, ids in zip(*done, strict=True):
                if folder is not None:
                    write_png(folder / f"{writer.frames_written:09d}.png", ids)
                writer.write(blend(frame, ids, palette, ignore_index=ignored, opacity=by.opacity))
            bar.update(len(done[1]))

        run_pipeline(_batches(reader, by.batch_size), infer, write, depth=DEPTH)
    return writer.frames_written, time.perf_counter() - start


def _batches(frames: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    iterator = iter(frames)
    while batch := list(islice(iterator, size)):
        yield batch
