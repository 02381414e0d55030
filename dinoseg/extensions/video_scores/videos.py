"""mode=eval on videos: masks of tracked objects, written in the benchmark's layout and scored by its protocol."""

import logging
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import dropwhile, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dinoseg.checkpoints.unread import warn_unread
from dinoseg.data.splits import find_groups
from dinoseg.evaluation.run_facts import TRACKING
from dinoseg.experiment.provenance import Provenance
from dinoseg.extensions.annotations.drawing import Drawing
from dinoseg.extensions.clips.videos import VOID, Video
from dinoseg.extensions.protocols.contract import Cases, ScoreProtocol, ScoringCase
from dinoseg.extensions.protocols.folders import Unscorable, score_cases
from dinoseg.extensions.protocols.report import report, write_problems
from dinoseg.extensions.tracking.tracker import LabelledFrames, Tracker
from dinoseg.extensions.video_scores.benchmark_videos import BenchmarkVideos
from dinoseg.extensions.video_scores.report import report_videos
from dinoseg.extensions.video_scores.restart import earlier_run, log_copied, take_over
from dinoseg.inference.stream import Throughput, run_pipeline
from dinoseg.report.overlay import blend
from dinoseg.report.palette import default_palette, write_indexed_png
from dinoseg.report.progress import Bar
from dinoseg.training.engine import Engine
from dinoseg.utils.atomic import atomic_folder, write_json
from dinoseg.utils.errors import UserError
from dinoseg.utils.forms import as_read_back
from dinoseg.utils.images import write_png
from dinoseg.utils.ranges import OnError
from dinoseg.utils.wording import count_of, join_names

logger = logging.getLogger(__name__)
BLENDS = "blends"
_DEPTH = 2  # batches queued before and after the tracker
_JPEG_QUALITY = 90
_NO_REFERENCES = (
    "These videos have public masks of first frames only: submit the predicted masks to the benchmark's server."
)
_NO_PROTOCOL = "The data set has no protocol for them, or mode.official=false leaves it out."


@dataclass(frozen=True)
class TrackedVideo:
    """Result of one video."""

    frames: int  # tracked frames, without copied ones
    problem: tuple[str, str] | None = None  # name of the video and reason, if it was left out
    taken_over: str | None = None  # name of the video, if its masks are from an earlier run


@dataclass(frozen=True)
class VideoTracking:
    """Settings and output folders for tracking the videos of a split.

    Args:
        make_tracker: creates a tracker without any state.
        out_dir: the run folder.
        masks: folder with one mask folder per video.
        blends: folder with one blend folder per video; None writes no blends.
        prompts: which masks prompt a tracker, see `prompted_frames`.
        written: names of the frames whose masks are written, by video; None for all.
        batch_size: frames per call of the tracker.
        skip: whether to leave out videos that cannot be tracked.
        earlier: run folder whose masks are reused; None without one.
    """

    make_tracker: Callable[[], Tracker]
    out_dir: Path
    masks: Path
    blends: Path | None
    prompts: str
    written: Mapping[str, Collection[str]] | None
    batch_size: int
    skip: bool
    earlier: Path | None

    def track(self, videos: Sequence[Video]) -> list[TrackedVideo]:
        """Track videos one after the other, write their masks, and log the speed.

        Raises:
            UserError: a video cannot be tracked, or its masks cannot be written.
        """
        start = time.perf_counter()
        try:
            tracked = [self._track_video(video) for video in Bar(videos, "tracking", unit="video", leave=False)]
        except OSError as error:
            raise UserError(
                f"Cannot write below {self.out_dir} ({error}). Free some space, and resume with "
                f"{shlex.quote(f'mode.restart={self.out_dir}')}."
            ) from error
        except KeyboardInterrupt:
            word = shlex.quote(f"mode.restart={self.out_dir}")
            logger.warning("Stopped: the same command with %s reuses the finished videos.", word)
            raise
        frames, seconds = sum(video.frames for video in tracked), time.perf_counter() - start
        rate = f"{frames / seconds:.2f} frames/s including reading and writing"
        logger.info("%s tracked in %.1f s: %s", count_of(frames, "frame"), seconds, rate)
        return tracked

    def _track_video(self, video: Video) -> TrackedVideo:
        """Write a video's masks, or copy them from the earlier run."""
        written = None if self.written is None else self.written.get(video.name, ())
        if take_over(self.earlier, self.out_dir, self._files(video, written)):
            return TrackedVideo(0, taken_over=video.name)
        try:
            write_masks(
                video,
                self.make_tracker(),
                self.masks / video.name,
                prompts=self.prompts,
                blends=None if self.blends is None else self.blends / video.name,
                written=written,
                batch_size=self.batch_size,
            )
        except UserError as error:
            if not self.skip:
                raise
            return TrackedVideo(0, (video.name, str(error)))
        return TrackedVideo(len(video.frames))

    def _files(self, video: Video, written: Collection[str] | None) -> dict[Path, list[str]]:
        """Return the expected names of a video's files in each folder."""
        frames = [name for name in video.frame_names if written is None or name in written]
        files = {self.masks / video.name: [f"{name}.png" for name in frames]}
        if self.blends is not None:
            files[self.blends / video.name] = [f"{name}.jpg" for name in frames]
        return files


@dataclass(frozen=True)
class TrackingOptions:
    """Options of an evaluation of tracked videos.

    Args:
        metrics_only: write no blends.
        official: score the masks.
        restart: run folder whose masks of finished videos are reused; None without one.
        report: write report.html.
    """

    metrics_only: bool = False
    official: bool = True
    restart: str | None = None
    report: bool = True


def evaluate_videos(
    data: BenchmarkVideos,
    make_tracker: Callable[[], Tracker],
    engine: Engine,
    out_dir: Path,
    options: TrackingOptions,
    provenance: Provenance,
) -> dict[str, Any]:
    """Track the objects of all videos of a split and score their masks; return the scores.

    Masks go to `out_dir`/<data.tracking.folder>/<video>/<frame>.png, blends to `out_dir`/blends. `scores.json` equals
    that of mode=score for the same masks; it is not written if the split has only first masks as references.

    Args:
        data: videos of a benchmark.
        make_tracker: creates a tracker for a video.
        engine: device and ranks; each rank takes every n-th video.
        out_dir: the run folder.
        options: of outputs and scores.
        provenance: the run and its model.

    Raises:
        UserError: prompt masks are missing, files cannot be read or scored, or the disk is full.
    """
    first_tracker = make_tracker()  # only for the settings that all trackers share
    record = as_read_back({"data": data.source, "given": data.prompts, "tracker": first_tracker.settings})
    tracking = VideoTracking(
        make_tracker=make_tracker,
        out_dir=out_dir,
        masks=out_dir / data.folder,
        blends=None if options.metrics_only else out_dir / BLENDS,
        prompts=data.prompts,
        written=data.written,
        batch_size=engine.images_at_once(),
        skip=data.skip,
        earlier=earlier_run(options.restart, record),
    )
    if engine.is_main:
        warn_unread(out_dir, first_tracker.unread, first_tracker.unread_because)
        write_json(out_dir / TRACKING, record)
    tracked = tracking.track(data.videos[engine.rank :: engine.world_size])
    copied = engine.gather([video.taken_over for video in tracked if video.taken_over is not None])
    reasons = engine.gather([video.problem for video in tracked if video.problem is not None])
    problems = [(tracking.masks / name, reason) for name, reason in reasons]
    result: dict[str, Any] = {"videos": len(data.videos) - len(problems)}
    if engine.is_main:
        log_copied(options.restart, copied)
        print(f"masks:        {tracking.masks}/<video>/<frame>.png, indexed, with the palette of DAVIS")
        print(f"blends:       {tracking.blends or 'none'}")
        scored_by = data.protocol if options.official else None
        result |= score_masks(
            scored_by,
            data.videos,
            tracking.masks,
            out_dir,
            group=provenance.group,
            problems=problems,
            skip=tracking.skip,
        )
        if options.report:
            report_videos(provenance, out_dir, tracking.blends, split=data.split)
    engine.close()
    return {**result, "run": str(out_dir)}


def score_masks(
    protocol: ScoreProtocol | None,
    videos: Sequence[Video],
    folder: Path,
    out_dir: Path,
    *,
    group: str | None = None,
    problems: Sequence[tuple[Path, str]] = (),
    skip: bool = False,
) -> dict[str, Any]:
    """Print the scores of the masks `folder`/<video>/<frame>.png, as in mode=score, and write `out_dir`/scores.json.

    Returns the scores. They are empty, with the reason printed, without a protocol. They are also empty if no video has
    masks beyond those of the frames in which objects appear.

    Args:
        protocol: scores the masks; None without one.
        videos: videos of the data set.
        folder: folder of the masks.
        out_dir: the run folder; masks without a file of their own are written into its folder references.
        group: regular expression of `data.group`, whose groups of videos are the units of the intervals.
        problems: folder and reason of each video that was left out.
        skip: whether to leave out files that cannot be scored.

    Raises:
        UserError: some files cannot be scored.
    """
    known = [
        video for video in videos if video.dense and video.masks and (len(video.masks) > 1 or len(video.frames) == 1)
    ]
    if protocol is None or not known:
        if problems:
            path = write_problems(out_dir, {folder: problems})
            logger.warning("%s left out, with reasons in %s.", count_of(problems, "video"), path)
        print(f"scores:       none. {_NO_PROTOCOL if known else _NO_REFERENCES}")
        return {}
    if protocol.annotations is None:  # DAVIS scores in the order of its list, other protocols by name
        known.sort(key=lambda video: video.name)
    left_out = {path for path, _ in problems}
    advice = f"The masks are saved: {shlex.quote(f'mode.restart={out_dir}')} reuses them."
    cases, left = [], list(problems)
    for video in (video for video in known if folder / video.name not in left_out):
        try:
            cases.append(_case(video, folder, out_dir / "references"))
        except UserError as error:
            if not skip:
                raise UserError(f"{error}\n{advice}") from error
            left.append((folder / video.name, str(error)))
    listing = Cases(cases, left)
    if bare := [video.name for video in videos if video not in known]:
        listing.notes.append(f"{count_of(bare, 'video')} without references not scored: {join_names(bare)}")
    groups, notes = find_groups(group, [case.name for case in cases], "data.group")
    listing.notes += notes
    try:
        where = f"the data set and {folder}"
        on_error: OnError = "skip" if skip else "stop"
        scored = score_cases(protocol, listing, where=where, groups=groups, on_error=on_error, remedy=advice)
    except Unscorable as error:
        write_problems(out_dir, {folder: error.problems})
        raise UserError(f"{error}\n{advice}") from error
    scores = report(protocol, scored, out_dir / "scores.json")["scores"]
    print(f"\nscores:       {out_dir}/scores.json")
    return scores


def _case(video: Video, folder: Path, references: Path) -> ScoringCase:
    """Return a video's masks and predictions; masks without a file of their own are written below `references`."""
    files = []
    for position, mask in sorted(video.masks.items()):
        file = f"{video.frame_name(position)}.png"
        if isinstance(mask, Drawing) or video.square is not None:
            ids, mask = video.mask(position), references / video.name / file
            assert ids is not None
            mask.parent.mkdir(parents=True, exist_ok=True)
            write_png(mask, ids)
        files.append((mask, folder / video.name / file))
    return ScoringCase(video.name, video.name, tuple(files))


class PromptedFrame(NamedTuple):
    """Frame with the mask that prompts the tracker."""

    name: str
    image: np.ndarray  # (H, W, 3) uint8
    labels: np.ndarray | None  # (H, W) uint8 IDs, 0 = background or no new object


def prompted_frames(video: Video, prompts: str) -> Iterator[PromptedFrame]:
    """Yield a video's frames, one at a time, with the masks that prompt a tracker; void becomes background.

    Args:
        video: video that is read frame by frame.
        prompts: `none`: no mask; `first`: the mask of frame 0; `appearing`: the mask of each object in the frame in
            which it appears, without the other objects.

    Raises:
        UserError: a frame differs in size from the first one, a mask differs from its frame, or frame 0 has no mask
            with `prompts` "first".
    """
    if prompts == "first" and 0 not in video.masks:
        raise UserError(
            f"Video {video.name} has no mask of its first frame, {video.frames[0]}, which defines its objects. Add "
            "this mask, or leave the video out."
        )
    size: tuple[int, ...] = ()
    known = np.zeros(256, dtype=bool)
    known[[0, VOID]] = True
    for position in range(len(video.frames)):
        image = video.image(position)
        size = size or image.shape
        if image.shape != size:
            raise UserError(
                f"Frames of video {video.name} differ in size: {video.frames[0]} is {_size(size)} (width x height), "
                f"{video.frames[position]} is {_size(image.shape)}. Make them equal."
            )
        wanted = prompts == "appearing" or (prompts == "first" and position == 0)
        mask = video.mask(position) if wanted else None
        if mask is not None and mask.shape != size[:2]:
            raise UserError(
                f"{video.frames[position]} is {_size(size)} (width x height), its mask {video.masks[position]} is "
                f"{_size(mask.shape)}. Replace the one that is wrong."
            )
        yield PromptedFrame(
            video.frame_name(position), image, None if mask is None else _new_objects(mask, known, position)
        )


def write_masks(
    video: Video,
    tracker: Tracker,
    folder: Path,
    *,
    prompts: str,
    blends: Path | None = None,
    written: Collection[str] | None = None,
    batch_size: int = 1,
) -> Throughput:
    """Track a video's objects and write `folder`/<frame>.png for each frame: IDs with the palette of DAVIS.

    Both folders appear only when complete. Frames before the first given mask contain no object.

    Args:
        video: video that is read frame by frame.
        tracker: tracker without any frame yet.
        folder: folder of the masks.
        prompts: see `prompted_frames`.
        blends: folder of <frame>.jpg, frames tinted and outlined by their masks; None: not written.
        written: names of the frames to write; None: all.
        batch_size: frames passed to the tracker at once.

    Raises:
        UserError: see `prompted_frames`, or an error of the tracker.
        OSError: the disk is full or not writable.
    """
    started = prompts == "none"

    def follow(batch: list[PromptedFrame]) -> list[tuple[PromptedFrame, np.ndarray]]:
        nonlocal started
        early = 0  # frames before the first mask, which a tracker that needs one would refuse
        while not started and early < len(batch):
            started = batch[early].labels is not None
            early += not started
        masks = [np.zeros(frame.image.shape[:2], np.uint8) for frame in batch[:early]]
        if rest := batch[early:]:
            masks += tracker.track([frame.image for frame in rest], [frame.labels for frame in rest])
        return list(zip(batch, masks, strict=True))

    tracker.look_ahead(lambda: _from_first_mask(video, prompts, batch_size))
    with ExitStack() as stack:
        for_masks = stack.enter_context(atomic_folder(folder))
        for_blends = None if blends is None else stack.enter_context(atomic_folder(blends))

        def write(tracked: list[tuple[PromptedFrame, np.ndarray]]) -> None:
            for frame, ids in tracked:
                if written is not None and frame.name not in written:
                    continue
                write_indexed_png(for_masks / f"{frame.name}.png", ids)
                if for_blends is not None:
                    tinted = blend(frame.image, ids, default_palette(256), opacity=0.5, outline=None)
                    Image.fromarray(tinted).save(for_blends / f"{frame.name}.jpg", quality=_JPEG_QUALITY)

        return run_pipeline(_batches(prompted_frames(video, prompts), batch_size), follow, write, depth=_DEPTH)


def _from_first_mask(video: Video, prompts: str, batch_size: int) -> Iterator[LabelledFrames]:
    """Yield a video's frames and masks in batches, starting at the first mask if masks are prompts."""
    frames = dropwhile(lambda frame: prompts != "none" and frame.labels is None, prompted_frames(video, prompts))
    for batch in _batches(frames, batch_size):
        yield [frame.image for frame in batch], [frame.labels for frame in batch]


def _new_objects(mask: np.ndarray, known: np.ndarray, position: int) -> np.ndarray | None:
    """Return the objects of a mask that are not in `known` (256,) bool, and add them to it; None if there are none.

    The mask of frame 0 is returned even without objects.
    """
    new = (np.bincount(mask.ravel(), minlength=256) > 0) & ~known
    known |= new
    return np.where(new[mask], mask, 0).astype(np.uint8) if new.any() or position == 0 else None


def _batches(frames: Iterator[PromptedFrame], size: int) -> Iterator[list[PromptedFrame]]:
    while batch := list(islice(frames, size)):
        yield batch


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]} x {shape[0]}"
