"""A whole video through a tracker: decode | track | write masks, in steady memory, to be gone on with after a stop."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from dinoseg.errors import UserError
from dinoseg.inference.frame_folder import FolderReader
from dinoseg.inference.media import VideoReader
from dinoseg.inference.stream import Throughput, run_pipeline
from dinoseg.report.indexed import voc_palette, write_indexed_png
from dinoseg.report.progress import Bar
from dinoseg.shapes import Palette
from dinoseg.tracking.tracker import Tracker
from dinoseg.tracking.video.labels import TrackLabels
from dinoseg.tracking.video.state import MASKS, Progress, Standing, check_batch_size, check_masks, save_standing
from dinoseg.wording import count_of, listed

_DEPTH = 2  # batches that wait on either side of the tracker


@dataclass(frozen=True)
class Look:
    """How masks are shown.

    Args:
        palette: a colour for each id.
        background: the id that is no object; None: all are.
    """

    palette: Palette = voc_palette()
    background: int | None = 0


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
    frames: VideoReader | FolderReader
    labels: TrackLabels
    folder: Path
    start: Progress | None = None
    batch_size: int = 4
    save_every: int = 100
    look: Look = Look()


@dataclass(frozen=True)
class _Chunk:
    names: list[str]
    frames: list[np.ndarray]
    labels: list[np.ndarray | None]
    before: Progress
    save: bool | None = None  # the run's standing before this chunk; None: when it is due


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
    reader = _Reader(job)
    saved = reader.progress().done
    count = 0
    unsaved: list[Path] = []

    def infer(chunk: _Chunk) -> tuple[_Chunk, dict[str, Tensor] | None, list[np.ndarray]]:
        nonlocal saved
        due = chunk.before.done - saved >= job.save_every if chunk.save is None else chunk.save
        state = job.tracker.state() if due else None
        saved = chunk.before.done if due else saved
        return chunk, state, job.tracker.track(chunk.frames, chunk.labels) if chunk.frames else []

    def write(done: tuple[_Chunk, dict[str, Tensor] | None, list[np.ndarray]]) -> None:
        nonlocal count
        chunk, state, masks = done
        if state is not None:  # all masks before are on the disk by now
            save_standing(job.folder, Standing(chunk.before, job.tracker.settings, state), unsaved)
            unsaved.clear()
        for name, mask in zip(chunk.names, masks, strict=True):
            unsaved.append(job.folder / MASKS / f"{name}.png")
            write_indexed_png(unsaved[-1], mask, job.look.palette)
        count += len(masks)
        bar.update(len(masks))

    if job.start is None:
        save_standing(job.folder, Standing(reader.progress(), job.tracker.settings, job.tracker.state()))
    else:
        check_batch_size(job.folder, job.start.batch_size, job.batch_size)
    total = job.frames.count or None
    with Bar(total=total, initial=saved, unit="frame", desc=job.frames.path.name) as bar:
        passed = run_pipeline(reader, infer, write, depth=_DEPTH)
    reader.check_end()
    return Throughput(count, passed.seconds)


class _Reader:
    """The chunks that are not done, read one ahead; the last is shorter than a batch, and perhaps empty."""

    def __init__(self, job: TrackJob) -> None:
        self._job = job
        self._frames, self._labels = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        self._count = job.start.done if job.start else 0
        self._failure: UserError | None = None

    def progress(self) -> Progress:
        return Progress(self._count, self._frames.hexdigest(), self._labels.hexdigest(), self._job.batch_size)

    def __iter__(self) -> Iterator[_Chunk]:
        frames = iter(self._job.frames)
        self._skip(frames)
        chunk = self._chunk(frames)
        while len(chunk.frames) == self._job.batch_size:
            after = self._chunk(frames)
            # what came just before a failure may be damaged, and shall be read again
            yield chunk if self._failure is None else replace(chunk, save=True)
            chunk = after
        yield replace(chunk, save=self._failure is None)

    def check_end(self) -> None:
        """Raise what ended the input too early, or refuse masks whose frames never came."""
        go_on = (
            f"{count_of(self._count, 'mask')} so far are in {self._job.folder / MASKS}: the same command with "
            f"mode.restart={self._job.folder} goes on there."
        )
        if self._failure is not None:
            raise UserError(f"{self._failure} {go_on}") from self._failure
        late = [path.name for position, path in self._job.labels.files.items() if position >= self._count]
        if late:
            raise UserError(
                f"labels has {count_of(late, 'mask')} of no frame: {listed(late)}, and {self._job.frames.path} has "
                f"{count_of(self._count, 'frame')}. Remove or rename them. {go_on}"
            )

    def _chunk(self, frames: Iterator[np.ndarray]) -> _Chunk:
        chunk = _Chunk([], [], [], self.progress())
        try:
            while len(chunk.frames) < self._job.batch_size:
                mask = self._job.labels.read(self._count)
                frame = next(frames, None)
                if frame is None:
                    break
                self._note(self._count, frame, mask)
                chunk.names.append(self._job.frames.frame_name(self._count))
                chunk.frames.append(frame)
                chunk.labels.append(mask)
                self._count += 1
        except UserError as error:  # what came before it shall still be tracked and kept
            self._failure = error
        return chunk

    def _skip(self, frames: Iterable[np.ndarray]) -> None:
        """Read the frames that are done, and refuse others than the run has seen, or lost masks of them."""
        start, seen = self._job.start, 0
        while start and seen < start.done:
            frame = next(iter(frames), None)
            if frame is None:
                raise UserError(
                    f"{self._job.frames.path} has {count_of(seen, 'frame')}, and the run in {self._job.folder} has "
                    f"tracked {start.done}. {self._remedy()}"
                )
            self._note(seen, frame, self._job.labels.read(seen))
            seen += 1
        for what, now, then in (
            (f"input={self._job.frames.path}", self.progress().frames, start.frames if start else ""),
            (f"labels={self._job.labels.source or 'null'}", self.progress().labels, start.labels if start else ""),
        ):
            if start and now != then:
                raise UserError(
                    f"mode.restart={self._job.folder}: {what} differs from what that run has seen in its first "
                    f"{count_of(start.done, 'frame')}. {self._remedy()}"
                )
        check_masks(self._job.folder, map(self._job.frames.frame_name, range(seen)))

    def _remedy(self) -> str:
        return (
            f"Give what it had, unchanged (its command line is in {self._job.folder / 'config' / 'overrides.txt'}), or "
            "begin anew without mode.restart."
        )

    def _note(self, position: int, frame: np.ndarray, mask: np.ndarray | None) -> None:
        self._frames.update(f"{self._job.frames.frame_name(position)} {frame.shape}".encode(errors="surrogateescape"))
        self._frames.update(np.ascontiguousarray(frame).data)
        if mask is not None:
            self._labels.update(f"{position}".encode())
            self._labels.update(np.ascontiguousarray(mask).data)
