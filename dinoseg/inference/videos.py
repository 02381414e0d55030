"""Contract of what segments videos in mode=predict, which a config names; images need none."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dinoseg.inference.image_run import ImageRun, SegmentationSettings
from dinoseg.inference.stream import Throughput


@dataclass(frozen=True)
class VideoOptions:
    """Options of video segmentation.

    Args:
        masks: whether to write the class IDs of each frame.
        frames: maximum number of frames; None: all.
        outputs: further outputs per frame, validated by `check_outputs`.
    """

    masks: bool = False
    frames: int | None = None
    outputs: Sequence[str] = ()


@dataclass(frozen=True)
class VideoInput:
    """Video to segment.

    Args:
        name: prefix of its result files.
        path: the file.
    """

    name: str
    path: Path


class VideoSegmenter(ABC):
    """Base class of what segments videos."""

    suffixes: Sequence[str]  # of the files that it takes, in lower case

    @abstractmethod
    def check(self, videos: Sequence[VideoInput], batch_size: int) -> None:
        """Check that at least one video can be segmented; this needs no model.

        Raises:
            UserError: no video can be segmented; the message states the reason for each.
        """

    @abstractmethod
    def segment(
        self, settings: SegmentationSettings, video: VideoInput, run: ImageRun, options: VideoOptions
    ) -> Throughput | None:
        """Write the results of a video to the run folder, and count its frames; None if it was done before.

        Raises:
            UserError: the video cannot be read to its end, or the disk is full; partial results are deleted.
            OSError: a mask cannot be written.
        """
