"""A whole video through a tracker: decode | track | write masks, in steady memory, to be gone on with after a stop."""

from dataclasses import dataclass
from pathlib import Path

from dinoseg.inference.inputs import FrameReader
from dinoseg.inference.stream import Throughput, run_pipeline
from dinoseg.report.progress import Bar
from dinoseg.tracking.tracker import Tracker
from dinoseg.tracking.video.batches import FrameBatch, VideoBatches
from dinoseg.tracking.video.labels import TrackLabels
from dinoseg.tracking.video.mask_folder import Look, MaskFolder, TrackedBatch
from dinoseg.tracking.video.state import Standing, TrackProgress, check_batch_size, save_standing

_DEPTH = 2  # batches that wait on either side of the tracker


@dataclass(frozen=True)
class TrackJob:
    """What is tracked, by what, and where to.

    Args:
        tracker: new, or with the state of what is done.
        frames: read from their start, whatever is done.
        labels: the masks given.
        folder: where masks/<frame>.png and the run's standing go.
        start: what is done; None for a new run.
        batch_size: frames tracked at once.
        save_every: frames between two savings of where the run stands, rounded up to whole batches.
        look: the masks' colours.
    """

    tracker: Tracker
    frames: FrameReader
    labels: TrackLabels
    folder: Path
    start: TrackProgress | None = None
    batch_size: int = 4
    save_every: int = 100
    look: Look = Look()


def track_video(job: TrackJob) -> Throughput:
    """Write the masks of all frames that are not done; return how many, and the seconds with decoding and writing.

    What the folder keeps of the run's standing is written before the first frame, every `save_every` frames, and
    where the input ends: always at the end of a whole batch, so that a run that goes on there sees the same batches,
    and gives the same masks. Where the input ends too early the last frames may be damaged: the standing is then one
    batch or more before the end. Another `batch_size` is warned of.

    Raises:
        UserError: input or labels are not those of the run that is gone on with, masks that it has written are lost, a
            frame or a mask cannot be used, a mask is given for a frame that never came, or the disk is full.
    """
    tracker = job.tracker
    batches = VideoBatches(
        job.frames, job.labels, job.folder, job.start, batch_size=job.batch_size, save_every=job.save_every
    )
    start = batches.progress()
    if job.start is None:
        save_standing(job.folder, Standing(start, tracker.settings, tracker.state()))
    else:
        check_batch_size(job.folder, job.start.batch_size, job.batch_size)

    def follow(batch: FrameBatch) -> TrackedBatch:
        # taken now, before the tracker goes on, and written in the next stage, when all masks before the batch are
        standing = Standing(batch.before, tracker.settings, tracker.state()) if batch.save else None
        masks = tracker.track(batch.frames, batch.labels)
        return TrackedBatch(standing, dict(zip(batch.names, masks, strict=True)))

    total = job.frames.count or None
    with Bar(total=total, initial=start.done, unit="frame", desc=job.frames.path.name) as bar:
        masks = MaskFolder(job.folder, job.look.palette, bar)
        passed = run_pipeline(batches, follow, masks.write, depth=_DEPTH)
    batches.check_end()
    return Throughput(masks.count, passed.seconds)
