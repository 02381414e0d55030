"""What every tracker promises: objects followed through one video, in memory that does not grow with its length."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoseg.utils.errors import UserError

Autocast = Callable[[], AbstractContextManager]
Size = tuple[int, int]
LabelledFrames = tuple[Sequence[np.ndarray], Sequence[np.ndarray | None]]  # as `Tracker.track` takes them


class Tracker(ABC):
    """One video's tracker: frames in order in, a mask for each out.

    Args:
        device: where its model is.
        autocast: gives the precision's context for a forward pass.
        batch_size: frames that its model sees at once.
    """

    unread: Sequence[str] = ()  # groups and keys of the config that say nothing to it
    unread_because = ""  # a sentence that tells why

    def __init__(
        self, *, device: torch.device | str = "cpu", autocast: Autocast = nullcontext, batch_size: int = 4
    ) -> None:
        self.device = torch.device(device)
        self.autocast = autocast
        self.batch_size = batch_size
        self.size: Size | None = None  # (H, W) of the video's frames, once there is one

    def track(self, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Return the masks (H, W) uint8 of the next frames (H, W, 3) uint8 RGB, all of one size.

        `labels` has a mask (H, W) uint8 of object ids 0..n, or None, for each frame. The same frames in other batches
        give the same masks but for rounding.

        Raises:
            UserError: frames or labels that do not fit what was seen before.
        """
        masks: list[np.ndarray] = []
        for batch in self.batches(frames, labels):
            masks += self.track_batch(*batch)
        return masks

    def batches(self, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]) -> Iterator[LabelledFrames]:
        """Yield the next frames and labels, `batch_size` at a time, once they are known to be of the video's size."""
        # callers hand over as many frames as suits their files: what the model sees at once is limited by its memory
        for start in range(0, len(frames), self.batch_size):
            batch = slice(start, start + self.batch_size)
            self.size = common_size(self.size, frames[batch], labels[batch])
            yield frames[batch], labels[batch]

    def look_ahead(self, video: Callable[[], Iterable[LabelledFrames]]) -> None:  # noqa: B027 - most need nothing
        """See a whole video before its first frame is tracked, if the tracker asks for that.

        Args:
            video: gives its batches from the first one on; called if they are needed.
        """

    @abstractmethod
    def track_batch(self, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Return the masks of the next frames as `track` does: no more than `batch_size`, of the size `self.size`."""

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """Return in plain values (for JSON) what its masks depend on beside frames and labels.

        A run is only gone on with where they are equal. All weights are read for it, so it is made when asked for: not
        every video's tracker is.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return all that the next frame depends on; empty before the first."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state()` of a tracker with the same settings.

        Raises:
            ValueError: it is no such state.
        """

    def describe(self, size: Size) -> str:
        """Return in words how frames of `size` (H, W) are seen; "": there is nothing to say."""
        return ""

    def flicker(self) -> dict[str, float] | None:
        """Return what share of the pixels, 0 to 1, changes its class from frame to frame; None: that is not counted."""
        return None


def common_size(size: Size | None, frames: Sequence[np.ndarray], masks: Sequence[np.ndarray | None] = ()) -> Size:
    """Return the (H, W) that all frames and masks of a video share.

    Args:
        size: of the video's first frame; None: the first of these is it.
        frames: (H, W, 3), at least one.
        masks: (H, W) or None.

    Raises:
        UserError: one is of another size.
    """
    height, width = size or frames[0].shape[:2]
    shapes = [("frame", frame.shape[:2]) for frame in frames]
    shapes += [("mask", mask.shape) for mask in masks if mask is not None]
    for what, shape in shapes:
        if shape != (height, width):
            raise UserError(
                f"A {what} is {' x '.join(map(str, shape))} pixels, and the first frame {height} x {width} (H x W). "
                "All of a video need one size: resize it."
            )
    return height, width
