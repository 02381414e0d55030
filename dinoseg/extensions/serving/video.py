"""Labelled videos of the app: an overlay that plays in browsers, and a mask for each frame."""

import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from dinoseg.core.shapes import Palette
from dinoseg.extensions.serving.decoding import TimedFrame, VideoDecoder
from dinoseg.extensions.serving.mask_editor import count_pixels, encode_mask
from dinoseg.extensions.video.writer import VideoWriter
from dinoseg.inference.stream import run_pipeline
from dinoseg.utils.atomic import atomic_file

_BATCH = 4  # frames in a batch
_DEPTH = 2  # batches queued before and after the model

Masks = Iterable[np.ndarray]


def write_labelled_video(
    video: VideoDecoder,
    folder: Path,
    palette: Palette,
    segment: Callable[[Sequence[np.ndarray]], Masks],
    draw: Callable[[np.ndarray, np.ndarray], np.ndarray],
    progress: Callable[[int], None],
) -> np.ndarray:
    """Write overlay.mp4 and masks.zip, a file per frame, and return the number of pixels of each class (256,).

    Args:
        video: opened.
        folder: of the files.
        palette: colours of the masks.
        segment: returns the masks (H, W) or (K, H, W) uint8 of the next frames.
        draw: returns a frame with its mask over it.
        progress: called with the number of frames that are written; may raise an error to stop.
    """
    counts = np.zeros(256, np.int64)
    written = 0
    with (
        VideoWriter(folder / "overlay.mp4", video.rate, video.size, like=video.traits) as writer,
        atomic_file(folder / "masks.zip") as part,
        zipfile.ZipFile(part, "w") as archive,  # uncompressed: PNGs are compressed already
    ):

        def segment_batch(batch: list[TimedFrame]) -> tuple[list[TimedFrame], Masks]:
            return batch, segment([frame for frame, _ in batch])

        def write_batch(done: tuple[list[TimedFrame], Masks]) -> None:
            nonlocal counts, written
            for (frame, time), mask in zip(*done, strict=True):
                writer.write(draw(frame, mask), time)
                suffix = "tif" if mask.ndim > 2 else "png"
                archive.writestr(f"{written:09d}.{suffix}", encode_mask(mask, palette))
                counts += count_pixels(mask)
                written += 1
            progress(written)

        run_pipeline(_batch_frames(video), segment_batch, write_batch, depth=_DEPTH)
    return counts


def _batch_frames(video: VideoDecoder) -> Iterator[list[TimedFrame]]:
    frames = video.frames()
    while batch := list(islice(frames, _BATCH)):
        yield batch
