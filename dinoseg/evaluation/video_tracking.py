"""Masks of a split's videos: each video gets its own tracker, or its masks from an earlier evaluation."""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinoseg.data.clips.videos import Video
from dinoseg.evaluation.restart import digest_of, keep_digest, take_over
from dinoseg.report.progress import Bar
from dinoseg.tracking.tracker import Tracker
from dinoseg.tracking.video.benchmark_masks import write_masks
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackedVideo:
    """Result of one video."""

    frames: int  # tracked frames, without copied ones
    problem: tuple[Path, str] | None = None  # folder and reason, if the video was left out
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
                f"mode.restart={self.out_dir}."
            ) from error
        except KeyboardInterrupt:
            logger.warning("Stopped: the same command with mode.restart=%s reuses the finished videos.", self.out_dir)
            raise
        frames, seconds = sum(video.frames for video in tracked), time.perf_counter() - start
        rate = f"{frames / seconds:.2f} frames/s including reading and writing"
        logger.info("%s tracked in %.1f s: %s", count_of(frames, "frame"), seconds, rate)
        return tracked

    def _track_video(self, video: Video) -> TrackedVideo:
        """Write a video's masks, or copy them from the earlier run."""
        written = None if self.written is None else self.written.get(video.name, ())
        digest = digest_of(video, self.prompts)
        if take_over(self.earlier, self.out_dir, self._files(video, written), video.name, digest):
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
            return TrackedVideo(0, (self.masks / video.name, str(error)))
        keep_digest(self.out_dir, video.name, digest)
        return TrackedVideo(len(video.frames))

    def _files(self, video: Video, written: Collection[str] | None) -> dict[Path, list[str]]:
        """Return the expected names of a video's files in each folder."""
        frames = [name for name in video.frame_names if written is None or name in written]
        files = {self.masks / video.name: [f"{name}.png" for name in frames]}
        if self.blends is not None:
            files[self.blends / video.name] = [f"{name}.jpg" for name in frames]
        return files
