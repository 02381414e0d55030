"""Tracks of a video: a mask for each frame in which an object is visible; no torch."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from dinoseg.core.objects import Objects, RunLengths
from dinoseg.extensions.protocols.contract import ScoringCase


@dataclass(frozen=True)
class Tracks:
    """Masks of one side of a video, in the order of their frames.

    Args:
        frames: (N,) int64, frame of each mask, ascending.
        ids: (N,) int64, of the track.
        classes: (N,) int64, 0..K-1.
        masks: of each.
    """

    frames: np.ndarray
    ids: np.ndarray
    classes: np.ndarray
    masks: Sequence[RunLengths]

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[int, int, int]], masks: Sequence[RunLengths]) -> Self:
        """Return tracks of (frame, id, class) and the mask of each; those of a frame stay in order."""
        table = np.array(rows, np.int64).reshape(-1, 3)
        order = np.argsort(table[:, 0], kind="stable")
        return cls(*table[order].T, [masks[place] for place in order.tolist()])

    def select(self, is_kept: np.ndarray) -> "Tracks":
        """Return the masks where a flag (N,) is true."""
        masks = [self.masks[place] for place in np.flatnonzero(is_kept).tolist()]
        return Tracks(self.frames[is_kept], self.ids[is_kept], self.classes[is_kept], masks)

    def find_frame(self, frame: int) -> slice:
        """Return the places of the masks of a frame."""
        return slice(*np.searchsorted(self.frames, [frame, frame + 1]).tolist())


@dataclass(frozen=True)
class VideoTracks:
    """Both sides of a video.

    Args:
        reference: annotated tracks.
        prediction: predicted tracks.
        ignored: region of a frame in which unmatched predictions do not count.
        scored: annotated and predicted tracks as objects of one image, whose frames lie side by side; None: predictions
            have no scores.
    """

    reference: Tracks
    prediction: Tracks
    ignored: Mapping[int, RunLengths] = field(default_factory=dict)
    scored: tuple[Objects, Objects] | None = None


class TrackCase(ScoringCase, ABC):
    """Base class of the files of a video, of one format."""

    @abstractmethod
    def read(self, places: Mapping[int, int]) -> VideoTracks:
        """Return the tracks of the video, given 0..K-1 of each category id.

        Raises:
            BadFile: a file is invalid.
        """


def join_frames(masks: Sequence[RunLengths], frames: Sequence[int], size: tuple[int, int]) -> RunLengths:
    """Return masks of frames of `size` (H, W) as one of an image in which the frames lie side by side.

    Runs without pixels are left out. Masks of one frame may overlap; the runs are then not in order.
    """
    starts, ends = (
        np.concatenate(
            [np.zeros(0, np.int64)]
            + [mask[end] + frame * size[0] * size[1] for mask, frame in zip(masks, frames, strict=True)]
        )
        for end in (0, 1)
    )
    is_used = ends > starts
    return RunLengths(starts[is_used], ends[is_used])
