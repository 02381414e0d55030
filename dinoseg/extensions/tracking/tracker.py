"""Base class of trackers, which follow objects through one video in memory independent of its length."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoseg.utils.errors import UserError

Autocast = Callable[[], AbstractContextManager]
Size = tuple[int, int]
LabelledFrames = tuple[Sequence[np.ndarray], Sequence[np.ndarray | None]]  # the arguments of `Tracker.track`


class TrackedObject(NamedTuple):
    """Class and mean score of an object of a video."""

    class_id: int
    score: float


class Tracker(ABC):
    """Base class of trackers of one video: consume frames in order and return one mask per frame.

    Config groups `tracker` and `slots` name subclasses (with `_partial_: true`) or factories of them, which are called
    with a backbone or a trained segmenter as the only positional argument, and with these keyword arguments.

    Args:
        device: device of its model.
        autocast: context manager factory of the precision.
        batch_size: frames per forward pass.
    """

    unread: Sequence[str] = ()  # config groups and keys that the tracker ignores
    unread_because = ""  # the reason, as a sentence

    def __init__(
        self, *, device: torch.device | str = "cpu", autocast: Autocast = nullcontext, batch_size: int = 4
    ) -> None:
        self.device = torch.device(device)
        self.autocast = autocast
        self.batch_size = batch_size
        self.size: Size | None = None  # (H, W) of the video's frames; None before the first frame

    def track(self, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Return the masks (H, W) uint8 of the next frames (H, W, 3) uint8 RGB, all of one size.

        `labels` has a mask (H, W) uint8 of object IDs 0..n, or None, for each frame. Other batch boundaries change
        masks by rounding only.

        Raises:
            UserError: frames or labels do not fit those tracked before.
        """
        masks: list[np.ndarray] = []
        for batch in self.batches(frames, labels):
            masks += self.track_batch(*batch)
        return masks

    def batches(self, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]) -> Iterator[LabelledFrames]:
        """Yield the next frames and labels, `batch_size` at a time, after checking that they have the video's size."""
        # callers choose batches for their files; this limit is for the model's memory
        for start in range(0, len(frames), self.batch_size):
            batch = slice(start, start + self.batch_size)
            self.size = common_size(self.size, frames[batch], labels[batch])
            yield frames[batch], labels[batch]

    def look_ahead(self, video: Callable[[], Iterable[LabelledFrames]]) -> None:  # noqa: B027 - most need nothing
        """Read the whole video before its first frame is tracked; by default a no-op.

        Args:
            video: function that returns an iterator over the video's batches from the first one.
        """

    @abstractmethod
    def track_batch(self, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Return the masks of at most `batch_size` next frames of size `self.size`, as `track` does."""

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """Return the settings that masks depend on besides frames and labels, as plain values for JSON.

        A run resumes only if they are equal. Evaluated lazily, because it reads all weights and not every tracker needs
        it.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return all tensors that the next frame depends on; empty before the first frame."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state()` of a tracker with the same settings.

        Raises:
            ValueError: the state is invalid.
        """

    def describe(self, size: Size) -> str:
        """Describe in words how frames of `size` (H, W) are resized; "" if there is nothing to report."""
        return ""

    def flicker(self) -> dict[str, float] | None:
        """Return the fraction of pixels, 0 to 1, that change class between frames; None if it is not measured."""
        return None

    def tracked_objects(self) -> Mapping[int, TrackedObject] | None:
        """Return the object of each ID so far; None if IDs have neither class nor score."""
        return None


def common_size(size: Size | None, frames: Sequence[np.ndarray], masks: Sequence[np.ndarray | None] = ()) -> Size:
    """Return the (H, W) that all frames and masks of a video share.

    Args:
        size: (H, W) of the video's first frame; None: `frames` starts with it.
        frames: (H, W, 3), at least one.
        masks: (H, W) or None.

    Raises:
        UserError: a frame or mask has another size.
    """
    height, width = size or frames[0].shape[:2]
    shapes = [("frame", frame.shape[:2]) for frame in frames]
    shapes += [("mask", mask.shape) for mask in masks if mask is not None]
    for what, shape in shapes:
        if shape != (height, width):
            raise UserError(
                f"A {what} is {' x '.join(map(str, shape))} pixels, but the first frame {height} x {width} (H x W). "
                "All frames and masks of a video need one size: resize it."
            )
    return height, width
