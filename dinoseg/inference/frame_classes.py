"""The classes of a video's frames: predicted for every n-th, averaged over time, held in between."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoseg.inference.predictor import Predictor


class SeenFrame(NamedTuple):
    """What is shown of a frame: class ids (H, W) uint8, and probabilities (K, H, W) on the device, if they are kept."""

    ids: np.ndarray
    probabilities: Tensor | None


class FrameClasses:
    """Classes of one video's frames, which come in order.

    With `smooth`, the class probabilities p of each predicted frame are averaged over time, m = smooth * m + (1 -
    smooth) * p from m = p of the first, and the class is where m is greatest. That needs whole probabilities: K float32
    numbers a pixel, of a batch and of m.

    Args:
        predictor: of the trained model.
        skip: every so manieth frame is predicted, the first one too; the frames between show the same.
        smooth: share of the frames before, at least 0 and below 1; 0: each frame by itself.
        probabilities: whether they are kept; with `smooth` those are m.
    """

    def __init__(
        self, predictor: Predictor, *, skip: int = 1, smooth: float = 0.0, probabilities: bool = False
    ) -> None:
        self._predictor, self._skip, self._smooth, self._keeps = predictor, skip, smooth, probabilities
        self._count = 0
        self._mean: Tensor | None = None  # (K, H, W)
        self._held: SeenFrame | None = None

    def of(self, frames: Sequence[np.ndarray]) -> list[SeenFrame]:
        """Return what the next frames (H, W, 3) uint8 RGB show."""
        due = [(self._count + place) % self._skip == 0 for place in range(len(frames))]
        predicted = iter(self._predicted([frame for frame, is_due in zip(frames, due, strict=True) if is_due]))
        shown = []
        for is_due in due:
            self._held = next(predicted) if is_due else self._held
            assert self._held is not None
            shown.append(self._held)
        self._count += len(frames)
        return shown

    def _predicted(self, frames: Sequence[np.ndarray]) -> list[SeenFrame]:
        if not frames:
            return []
        if not (self._smooth or self._keeps):
            return [SeenFrame(ids, None) for ids in self._predictor.ids(frames)]
        seen = []
        for shares in self._predictor.probabilities(frames):
            if self._smooth:
                # this way round the average of what does not change is that, to the bit
                shares = shares if self._mean is None else torch.lerp(self._mean, shares, 1 - self._smooth)
                self._mean = shares
            ids = shares.max(dim=0).indices.to(torch.uint8).cpu().numpy()
            seen.append(SeenFrame(ids, shares if self._keeps else None))
        return seen
