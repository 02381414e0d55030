"""Labelled videos of the app: an overlay that plays in browsers, and a mask for each frame."""

import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from dinoseg.core.objects import Objects, RunLengths
from dinoseg.core.shapes import Palette
from dinoseg.extensions.serving.decoding import TimedFrame, VideoDecoder
from dinoseg.extensions.serving.mask_editor import count_pixels, encode_mask
from dinoseg.extensions.tracking.tracker import Tracker
from dinoseg.extensions.video.writer import VideoWriter
from dinoseg.inference.stream import run_pipeline
from dinoseg.report.object_overlay import draw_objects
from dinoseg.utils.atomic import atomic_file

_BATCH = 4  # frames in a batch
_DEPTH = 2  # batches queued before and after the model

Masks = Iterable[np.ndarray]


class FollowedObjects:
    """The objects that a model finds in a video, with an ID each: its masks, drawn frames and counts.

    Args:
        track: returns the masks of IDs (H, W) uint8 of the next frames of the tracker.
        tracker: gives objects their IDs.
        palette: colours of the classes.
        opacity: of the colours, 0..1.
    """

    def __init__(
        self, track: Callable[[Sequence[np.ndarray]], Masks], tracker: Tracker, palette: Palette, opacity: float
    ) -> None:
        self._track, self._tracker = track, tracker
        self._palette, self._opacity = palette, opacity
        self._classes: dict[int, int] = {}  # of each ID

    def segment(self, frames: Sequence[np.ndarray]) -> Masks:
        """Return the masks of the next frames."""
        masks = self._track(frames)
        # here, since the tracker changes its objects while frames are drawn in another thread
        self._classes |= {number: found.class_id for number, found in (self._tracker.tracked_objects() or {}).items()}
        return masks

    def draw(self, frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return a frame with each object in the colour of its ID, with its number and an outline of its class."""
        runs = RunLengths.of_ids(mask)
        objects = Objects.of_runs(mask.shape, [*runs.values()], [self._classes[number] for number in runs])
        return draw_objects(frame, objects, self._palette, opacity=self._opacity, ids=[*runs])

    def count_classes(self, pixels: np.ndarray) -> tuple[np.ndarray, Counter[int]]:
        """Return the pixels (256,) of each class, from those of each ID, and the number of objects of each class."""
        counts = np.zeros(256, np.int64)
        np.add.at(counts, [*self._classes.values()], pixels[[*self._classes]])
        return counts, Counter(self._classes.values())


def write_labelled_video(
    video: VideoDecoder,
    folder: Path,
    palette: Palette,
    segment: Callable[[Sequence[np.ndarray]], Masks],
    draw: Callable[[np.ndarray, np.ndarray], np.ndarray],
    progress: Callable[[int], None],
) -> np.ndarray:
    """Write overlay.mp4 and masks.zip, a file per frame, and return the number of pixels of each id of a mask (256,).

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
