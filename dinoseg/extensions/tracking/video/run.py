"""Tracking pipeline of a whole video (read, track, write masks) in constant memory, resumable after a stop."""

import hashlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dinoseg.extensions.tracking.tracker import LabelledFrames, Tracker
from dinoseg.extensions.tracking.video.labels import TrackLabels
from dinoseg.extensions.tracking.video.mask_folder import MaskColours, MaskFolder, TrackedBatch
from dinoseg.extensions.tracking.video.state import (
    MASKS,
    TrackProgress,
    TrackState,
    check_batch_size,
    check_masks,
    save_track_state,
)
from dinoseg.extensions.video.frames import FrameReader, open_frames
from dinoseg.inference.stream import Throughput, run_pipeline
from dinoseg.report.progress import Bar
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, join_names

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
        # before the first frame, so that a run that is killed early can be resumed, too
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

    # frames are read and masks written while the tracker works on others; its own frames stay in order
    with Bar(total=total, initial=start.done, unit="frame", desc=job.frames.path.name) as bar:
        masks = MaskFolder(job.folder, job.colours.palette, bar)
        throughput = run_pipeline(batches, follow, masks.write, depth=_DEPTH)
    batches.check_end()
    return Throughput(masks.count, looking + throughput.seconds)


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


@dataclass(frozen=True)
class FrameBatch:
    """Batch of frames to track, with their names and given masks."""

    names: list[str]
    frames: list[np.ndarray]  # (H, W, 3) uint8
    labels: list[np.ndarray | None]  # (H, W) uint8
    before: TrackProgress  # progress of the run before this batch
    save: bool = False  # whether to save the run's state before this batch


class _LabelledFrame(NamedTuple):
    name: str
    frame: np.ndarray
    mask: np.ndarray | None


class VideoBatches:
    """Batches of the frames that are not done, in order; the last batch is shorter than the others, possibly empty.

    The state is due for saving every `save_every` frames, rounded up to whole batches, and at the end of the input. It
    is always saved before a batch, so that a resumed run sees the same batches. An input that ends early is reported by
    `check_end` only, so that the frames before the error are still tracked.

    Args:
        frames: reader at the start of the video, including frames that are done.
        labels: the given masks.
        folder: the run folder.
        start: progress of the run to resume; None: a new run.
        batch_size: frames per batch.
        save_every: frames between two saves.

    Raises:
        UserError: while iterating: frames or masks differ from those that the run has processed, or masks that it has
            written are missing.
    """

    def __init__(
        self,
        frames: FrameReader,
        labels: TrackLabels,
        folder: Path,
        start: TrackProgress | None,
        *,
        batch_size: int,
        save_every: int,
    ) -> None:
        self._frames, self._labels, self._folder, self._start = frames, labels, folder, start
        self._batch_size, self._save_every = batch_size, save_every
        self._frames_digest, self._labels_digest = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        self._done = start.done if start else 0
        self._failure: UserError | None = None

    def progress(self) -> TrackProgress:
        """Return the number of frames read, with digests of all of them."""
        digests = (self._frames_digest.hexdigest(), self._labels_digest.hexdigest())
        return TrackProgress(self._done, *digests, self._batch_size)

    def __iter__(self) -> Iterator[FrameBatch]:
        """Yield each batch after reading the next one, which shows whether the input ends in an error."""
        frames = self._labelled_frames()
        if self._start is not None:
            self._pass_over(frames, self._start)
        saved = self._done
        batch = self._next_batch(frames)
        while len(batch.frames) == self._batch_size:
            following = self._next_batch(frames)
            # frames just before an error may be damaged: a resumed run must read them again
            save = self._failure is not None or batch.before.done - saved >= self._save_every
            saved = batch.before.done if save else saved
            yield replace(batch, save=save)
            batch = following
        yield replace(batch, save=self._failure is None)

    def check_end(self) -> None:
        """Raise the error that ended the input early, or an error for masks whose frames do not exist."""
        go_on = (
            f"{count_of(self._done, 'mask')} so far are in {self._folder / MASKS}: the same command with "
            f"mode.restart={self._folder} resumes there."
        )
        if self._failure is not None:
            raise UserError(f"{self._failure} {go_on}") from self._failure
        surplus = [path.name for position, path in self._labels.files.items() if position >= self._done]
        if surplus:
            raise UserError(
                f"labels has {count_of(surplus, 'mask')} without frame: {join_names(surplus)}; {self._frames.path} has "
                f"{count_of(self._done, 'frame')}. Remove or rename them. {go_on}"
            )

    def _labelled_frames(self) -> Iterator[_LabelledFrame]:
        """Yield every frame with its name and mask, and add all three to the digests."""
        frames = iter(self._frames)
        for position in count():
            mask = self._labels.read(position)
            frame = next(frames, None)
            if frame is None:
                return
            name = self._frames.frame_name(position)
            # pixels, not file bytes: a truncated video may be replaced by the complete one before resuming
            self._frames_digest.update(f"{name} {frame.shape}".encode(errors="surrogateescape"))
            self._frames_digest.update(np.ascontiguousarray(frame).data)
            if mask is not None:
                self._labels_digest.update(f"{position}".encode())
                self._labels_digest.update(np.ascontiguousarray(mask).data)
            yield _LabelledFrame(name, frame, mask)

    def _next_batch(self, frames: Iterator[_LabelledFrame]) -> FrameBatch:
        batch = FrameBatch([], [], [], self.progress())
        try:
            for name, frame, mask in islice(frames, self._batch_size):
                batch.names.append(name)
                batch.frames.append(frame)
                batch.labels.append(mask)
                self._done += 1
        except UserError as error:  # the frames before it are still tracked and saved
            self._failure = error
        return batch

    def _pass_over(self, frames: Iterator[_LabelledFrame], start: TrackProgress) -> None:
        """Read the frames that are done; check that frames and labels are unchanged and the written masks exist."""
        remedy = (
            f"Use its unchanged input (its command line is in {self._folder / 'config' / 'overrides.txt'}), or start "
            "over without mode.restart."
        )
        names = [name for name, _, _ in islice(frames, start.done)]
        if len(names) < start.done:
            raise UserError(
                f"{self._frames.path} has {count_of(names, 'frame')}, but the run in {self._folder} has tracked "
                f"{start.done}. {remedy}"
            )
        now = self.progress()
        for what, same in (
            (f"input={self._frames.path}", now.frames == start.frames),
            (f"labels={self._labels.source or 'null'}", now.labels == start.labels),
        ):
            if not same:
                raise UserError(
                    f"mode.restart={self._folder}: {what} has changed in the first {count_of(start.done, 'frame')}. "
                    f"{remedy}"
                )
        check_masks(self._folder, names)
