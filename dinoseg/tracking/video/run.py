"""Tracking pipeline of a whole video (read, track, write masks) in constant memory, resumable after a stop."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dinoseg.inference.inputs import FrameReader, open_frames
from dinoseg.inference.stream import Throughput, run_pipeline
from dinoseg.report.progress import Bar
from dinoseg.tracking.tracker import LabelledFrames, Tracker
from dinoseg.tracking.video.batches import FrameBatch, VideoBatches
from dinoseg.tracking.video.labels import TrackLabels
from dinoseg.tracking.video.mask_folder import MaskColours, MaskFolder, TrackedBatch
from dinoseg.tracking.video.state import TrackProgress, TrackState, check_batch_size, save_track_state
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
_DEPTH = 2  # batches queued before and after the tracker


@dataclass(frozen=True)
class TrackJob:
    """Inputs, tracker and output folder of a tracking run.

    Args:
        tracker: new tracker, or one with the state of the run to resume.
        frames: reader at the start of the video, including frames that are done.
        labels: the given masks.
        folder: run folder for masks/<frame>.png and the saved state.
        start: progress of the run to resume; None: a new run.
        batch_size: frames tracked at once.
        save_every: frames between two saves of the state, rounded up to whole batches.
        colours: colours of the masks.
    """

    tracker: Tracker
    frames: FrameReader
    labels: TrackLabels
    folder: Path
    start: TrackProgress | None = None
    batch_size: int = 4
    save_every: int = 100
    colours: MaskColours = MaskColours()


def track_video(job: TrackJob) -> Throughput:
    """Track all frames that are not done and write their masks; return the throughput, decoding and writing included.

    The state is saved before the first frame, every `save_every` frames, and at the end of the input. It is always
    saved at the end of a whole batch, so that a resumed run sees the same batches and returns the same masks. If the
    input ends early, its last frames may be damaged; the state then lies one or more batches before the end. A changed
    `batch_size` is logged as a warning.

    Raises:
        UserError: input or labels differ from those of the run to resume, masks that it has written are missing, a
            frame or a mask is invalid, a mask has no frame, or the disk is full.
    """
    tracker = job.tracker
    batches = VideoBatches(
        job.frames, job.labels, job.folder, job.start, batch_size=job.batch_size, save_every=job.save_every
    )
    start = batches.progress()
    if job.start is None:
        save_track_state(job.folder, TrackState(start, tracker.settings, tracker.state()))
    else:
        check_batch_size(job.folder, job.start.batch_size, job.batch_size)

    size, total = job.frames.size, job.frames.count or None
    seen = tracker.describe(size)
    logger.info(
        "Tracking %s of %d x %d (height x width)%s",
        f"{total} frames" if total else "frames",
        *size,
        f": {seen}" if seen else "",
    )
    began = time.perf_counter()
    if not start.done:
        tracker.look_ahead(lambda: _ahead(job))
    looking = time.perf_counter() - began

    def follow(batch: FrameBatch) -> TrackedBatch:
        # captured before the tracker continues; the next stage saves it after all masks of earlier batches
        state = TrackState(batch.before, tracker.settings, tracker.state()) if batch.save else None
        masks = tracker.track(batch.frames, batch.labels)
        return TrackedBatch(state, dict(zip(batch.names, masks, strict=True)))

    with Bar(total=total, initial=start.done, unit="frame", desc=job.frames.path.name) as bar:
        masks = MaskFolder(job.folder, job.colours.palette, bar)
        passed = run_pipeline(batches, follow, masks.write, depth=_DEPTH)
    batches.check_end()
    return Throughput(masks.count, looking + passed.seconds)


def _ahead(job: TrackJob) -> Iterator[LabelledFrames]:
    """Yield the batches for a first pass over a video, from a separate reader.

    Raises:
        UserError: a frame or a mask cannot be read.
    """
    path, done = job.frames.path, 0
    with (
        open_frames(str(path)) as frames,
        Bar(total=frames.count or None, unit="frame", desc=f"first pass over {path.name}") as bar,
    ):
        each = iter(frames)
        while True:
            try:
                batch = list(islice(each, job.batch_size))
                labels = [job.labels.read(done + number) for number in range(len(batch))]
            except UserError as error:
                if not done:
                    raise
                raise UserError(
                    f"{error} No mask was written, since the first of two passes covers the whole video "
                    "(slots.passes=2); slots.passes=1 writes masks up to the error."
                ) from error
            if not batch:
                return
            yield batch, labels
            done += len(batch)
            bar.update(len(batch))
