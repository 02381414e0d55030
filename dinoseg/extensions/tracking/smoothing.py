"""Temporal smoothing of a trained segmenter's masks by label propagation, which reduces flicker."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.geometry import upsample
from dinoseg.extensions.tracking.grid.cells import area_mean
from dinoseg.extensions.tracking.grid.propagator import Propagator
from dinoseg.extensions.tracking.grid.settings import MatchSettings
from dinoseg.extensions.tracking.segmenter_tracker import SegmenterTracker, Share, crop_to_image
from dinoseg.extensions.tracking.state_form import TensorForm, check_state
from dinoseg.extensions.tracking.tracker import Autocast
from dinoseg.inference.trained_sizes import TrainedSizes
from dinoseg.models.model import SegmentationModel

_COUNTED = {"masks": TensorForm(torch.uint8, "2 H W"), "counts": TensorForm(torch.int64, "3", 0)}
_PROPAGATED = {
    "features": TensorForm(torch.float32, "F h w C"),
    "labels": TensorForm(torch.float32, "F h w K"),
}


class SmoothingTracker(SegmenterTracker):
    """Tracker that segments each frame and smooths its class probabilities with those of earlier frames.

    On the feature grid, label propagation contributes the fraction `smoothing` of the probabilities, and the frame
    itself the rest; later frames read this mixture. Only the change is upsampled bilinearly and added to the pixels, so
    that they retain their detail. With `smoothing` 0, the masks are the segmenter's own. The state is that of a
    `Propagator` plus two masks.

    Args:
        model: segmenter in eval mode, on its device.
        settings: matching between a cell and the cells of earlier frames.
        smoothing: fraction of a frame's probabilities that comes from earlier frames, 0 to 1.
        sizes: image sizes of its training, to which larger frames are reduced; None: no reduction.
        autocast: context manager factory of the precision.
        batch_size: frames per forward pass.
    """

    def __init__(
        self,
        model: SegmentationModel,
        settings: MatchSettings = MatchSettings(),  # noqa: B008 (frozen)
        *,
        smoothing: float = 0.5,
        sizes: TrainedSizes | None = None,
        autocast: Autocast = nullcontext,
        batch_size: int = 4,
    ) -> None:
        super().__init__(model, settings, sizes=sizes, autocast=autocast, batch_size=batch_size)
        self._share = smoothing
        self._propagator = Propagator(settings)
        self._last: np.ndarray | None = None  # (2, H, W): the segmenter's mask and the smoothed mask
        self._changed = np.zeros(2, np.int64)  # changed pixels of either mask
        self._compared = 0

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Return the settings that masks depend on besides frames and labels."""
        return {"kind": "smoothing", "smoothing": self._share, **self._common_settings()}

    @torch.no_grad()
    def track_batch(self, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Return the class IDs (H, W) uint8 of the next frames.

        Raises:
            UserError: labels are given.
        """
        prediction, features = self._predict(frames, labels)
        scores = prediction.scores()  # (B, K, H, W)
        masks = []
        for mask, frame, cells in zip(scores.max(dim=1).indices, scores, features, strict=True):
            smoothed = mask
            if self._share:
                probabilities = _probabilities(frame, prediction.mixture)
                smoothed = self._smooth_mask(mask, probabilities, cells, prediction.valid)
            masks.append(self._count_changes(mask, smoothed))
        return masks

    def flicker(self) -> dict[str, float]:
        """Return the fraction of pixels, 0 to 1, whose class changes in the next frame, over all masks so far.

        The keys are `before` and `after` smoothing; both are 0 for a single frame.
        """
        before, after = self._changed / max(1, self._compared)
        return {"before": float(before), "after": float(after)}

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that the next frame and the flicker depend on; empty before the first frame."""
        if self._last is None:
            return {}
        counts = torch.tensor([*self._changed.tolist(), self._compared])
        return {**self._propagator.state(), "masks": torch.from_numpy(self._last.copy()), "counts": counts}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state()` of a tracker with the same settings.

        Raises:
            UserError: the state has more frames than the settings allow.
            ValueError: the state is invalid.
        """
        if state:
            check_state(state, {**(_PROPAGATED if self._share else {}), **_COUNTED})
        needed = ("features", "labels") if state and self._share else ()  # without smoothing, none are stored
        self._propagator.load({key: state[key].to(self.device) for key in needed})
        self._last = state["masks"].cpu().numpy().copy() if state else None
        self.size = None if self._last is None else (self._last.shape[1], self._last.shape[2])
        counts = state["counts"].tolist() if state else [0, 0, 0]
        self._changed, self._compared = np.array(counts[:2], np.int64), int(counts[2])

    def _smooth_mask(self, mask: Tensor, pixels: Tensor, features: Tensor, valid: Share) -> Tensor:
        """Return the smoothed mask (H, W) of a frame with probabilities `pixels` (K, H, W); modifies `pixels`."""
        features, valid = crop_to_image(features, valid)
        # the mean in each cell of the features, which are what frames are compared by
        cells = area_mean(pixels, (features.shape[-2], features.shape[-1]), valid)  # (K, h, w)
        change = self._propagator.blend(features, cells, self._share) - cells
        # as in the first frame, whose labels come back unchanged: the segmenter's own mask, to the bit
        if not change.any():
            return mask
        size = (pixels.shape[-2], pixels.shape[-1])
        return pixels.add_(upsample(change[None], size, valid)[0]).max(dim=0).indices

    def _count_changes(self, mask: Tensor, smoothed: Tensor) -> np.ndarray:
        """Return the smoothed mask, and count the pixels of both masks whose class differs from the last frame."""
        now = torch.stack([mask, smoothed]).to(torch.uint8).cpu().numpy()
        if self._last is not None:
            self._changed += (now != self._last).sum(axis=(1, 2))
            self._compared += mask.numel()
        self._last = now
        return now[1].copy()


def _probabilities(scores: Tensor, mixture: bool) -> Tensor:
    """Return the softmax of `Prediction.logits` for one frame (K, H, W), in float32."""
    scores = scores.float()
    # scores of mask classification are sums of probabilities: softmax(log s) = s / sum(s)
    if mixture:
        return scores / scores.sum(0).clamp(min=torch.finfo(torch.float32).tiny)
    return scores.softmax(0)
