"""What follows objects through a video, frame by frame, in memory that does not grow with its length."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor


class VideoTracker(Protocol):
    """One video's tracker: frames in order in, a mask for each out."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return in plain values (for JSON) what its masks depend on beside frames and labels.

        A run is only gone on with where they are equal. All weights are read for it, so it is made when asked for: not
        every video's tracker is.
        """
        ...

    def track(self, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Return the masks (H, W) uint8 of the next frames (H, W, 3) uint8 RGB, all of one size.

        `labels` has a mask (H, W) uint8 of object ids 0..n, or None, for each frame.

        Raises:
            UserError: frames or labels that do not fit what was seen before.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Return all that the next frame depends on."""
        ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state()`."""
        ...
