"""Less flicker in the masks of a trained segmenter: what a frame shows, mixed with what the frames before it say."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoseg.errors import UserError
from dinoseg.geometry import upsample
from dinoseg.inference.trained_sizes import TrainedSizes, keep_scale
from dinoseg.model import Segmenter, backbone_size
from dinoseg.shapes import Prediction
from dinoseg.tracking.frame_features import Autocast, precision_of
from dinoseg.tracking.frame_size import one_size
from dinoseg.tracking.propagation.propagator import Propagator
from dinoseg.tracking.propagation.settings import DINOV3, OF_PIXELS, Settings
from dinoseg.tracking.propagation.tracker import model_settings
from dinoseg.tracking.tracker import TensorForm, check_state

_COUNTED = {"masks": TensorForm(torch.uint8, "2 H W"), "counts": TensorForm(torch.int64, "3", 0)}
_PROPAGATED = {
    "features": TensorForm(torch.float32, "F h w C"),
    "labels": TensorForm(torch.float32, "F h w K"),
}
Share = tuple[float, float]
Size = tuple[int, int]


def area_mean(pixels: Tensor, grid: Size, valid: Share) -> Tensor:
    """Return the mean (K, h, w) of pixels (K, H, W) inside each cell, weighted by area where a pixel lies in several.

    Only the top left `valid` share of the grid lies on the pixels. A cell that reaches beyond has the mean of its part
    on them, one that lies wholly beyond is 0.
    """
    rows = _shares(pixels.shape[-2], grid[0], valid[0]).to(pixels)  # (h, H)
    columns = _shares(pixels.shape[-1], grid[1], valid[1]).to(pixels)  # (w, W)
    with torch.autocast(pixels.device.type, enabled=False):
        return rows @ pixels @ columns.T


def with_features(model: Segmenter, images: Tensor) -> tuple[Prediction, Tensor]:
    """Return a prediction for images (B, 3, H, W) and, of the same pass, the backbone's last map (B, C, h, w).

    A head that runs the blocks itself asks for no maps: then it is the patch tokens that left the final norm last, of
    which it read its masks.
    """
    seen: dict[str, Any] = {}
    parts = {"maps": model.backbone, "tokens": getattr(model.backbone, "norm", None)}
    hooks = [
        part.register_forward_hook(lambda *call, name=name: seen.update({name: call[2]}))
        for name, part in parts.items()
        if part is not None
    ]
    try:
        prediction = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if "maps" in seen:
        return prediction, seen["maps"][-1]
    size = backbone_size((images.shape[-2], images.shape[-1]), model.scale, model.longest)
    grid = (math.ceil(size[0] / model.patch_size), math.ceil(size[1] / model.patch_size))
    return prediction, seen["tokens"][:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


class SmoothingTracker:
    """Masks of one video by a trained segmenter, in which a frame's class probabilities lean on the frames before it.

    On the feature grid, `smoothing` of the probabilities comes from label propagation and the rest from the frame; that
    is what later frames read. Pixels take over the change alone, enlarged bilinearly, so that they keep their own
    detail; a `smoothing` of 0 gives the segmenter's own masks. What it keeps is that of a Propagator, and two masks.

    Args:
        model: in eval mode, on its device.
        settings: of the propagation: its context, window and matches; how frames and masks are resized is not read.
        smoothing: share of a frame's probabilities that comes from the frames before it, 0 to 1.
        sizes: of its training, to which much larger frames are reduced; None: they are not.
        autocast: gives the precision's context for a forward pass.
        batch_size: frames that the model sees at once.

    Raises:
        UserError: `smoothing` is no share.
    """

    def __init__(
        self,
        model: Segmenter,
        settings: Settings = DINOV3,
        *,
        smoothing: float = 0.5,
        sizes: TrainedSizes | None = None,
        autocast: Autocast = nullcontext,
        batch_size: int = 4,
    ) -> None:
        if not 0 <= smoothing <= 1:
            raise UserError(
                f"mode.smoothing={smoothing}: give a share from 0 (each frame by itself) to 1 (only the first frame is "
                "segmented, the others follow it)."
            )
        self._model, self._share, self._autocast, self._batch_size = model, smoothing, autocast, batch_size
        self._device, self._sizes = next(model.parameters()).device, sizes
        keep_scale(model, sizes)
        self._propagator = Propagator(settings)
        self._last: np.ndarray | None = None  # (2, H, W): the segmenter's own mask, and the smoothed one
        self._changed = np.zeros(2, np.int64)  # pixels, of the one and of the other
        self._compared = 0

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """What the masks depend on beside frames and labels."""
        chosen = asdict(self._propagator.settings)
        return {
            "kind": "smoothing",
            "smoothing": self._share,
            "tracker": {key: value for key, value in chosen.items() if key not in OF_PIXELS},
            "model": model_settings(self._model),
            "precision": precision_of(self._autocast, self._device),
            **_large_frames(self._sizes),
        }

    def track(self, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Return the class ids (H, W) uint8 of the next frames (H, W, 3) uint8 RGB, all of one size.

        Raises:
            UserError: labels are given, or frames of another size than those before.
        """
        if any(mask is not None for mask in labels):
            raise UserError(
                "labels are given, but a trained segmenter finds its classes by itself. Leave labels out; or leave "
                "resume out to follow the objects of a mask."
            )
        found = []
        for start in range(0, len(frames), self._batch_size):
            batch = frames[start : start + self._batch_size]
            one_size(None if self._last is None else (self._last.shape[1], self._last.shape[2]), batch)
            found += [self._count(own, smoothed) for own, smoothed in self._masks(batch)]
        return found

    def flicker(self) -> dict[str, float]:
        """Return the share of pixels, 0 to 1, whose class is another in the next frame, of all masks so far.

        That is `before` and `after` they were smoothed; 0 for a single frame.
        """
        before, after = self._changed / max(1, self._compared)
        return {"before": float(before), "after": float(after)}

    def state(self) -> dict[str, Tensor]:
        """Return all that the next frame, and the flicker, depends on; empty before the first frame."""
        if self._last is None:
            return {}
        counts = torch.tensor([*self._changed.tolist(), self._compared])
        return {**self._propagator.state(), "masks": torch.from_numpy(self._last.copy()), "counts": counts}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state()` of the same settings.

        Raises:
            UserError: the state has more frames than the settings hold.
            ValueError: it is no such state.
        """
        if state:
            check_state(state, {**(_PROPAGATED if self._share else {}), **_COUNTED})
        needed = ("features", "labels") if state and self._share else ()  # without smoothing none are kept
        self._propagator.load({key: state[key].to(self._device) for key in needed})
        self._last = state["masks"].cpu().numpy().copy() if state else None
        counts = state["counts"].tolist() if state else [0, 0, 0]
        self._changed, self._compared = np.array(counts[:2], np.int64), int(counts[2])

    @torch.no_grad()
    def _masks(self, frames: Sequence[np.ndarray]) -> list[tuple[Tensor, Tensor]]:
        """Return the segmenter's own mask (H, W) of each frame, and the smoothed one."""
        images = torch.from_numpy(np.stack(frames)).to(self._device).permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W)
        with self._autocast():
            prediction, features = with_features(self._model, images)
        scores = prediction.scores()  # (B, K, H, W)
        own = scores.max(dim=1).indices
        if not self._share:
            return [(mask, mask) for mask in own]
        return [
            (mask, self._smoothed(mask, _probabilities(frame, prediction.mixture), maps, prediction.valid))
            for mask, frame, maps in zip(own, scores, features, strict=True)
        ]

    def _smoothed(self, own: Tensor, pixels: Tensor, features: Tensor, valid: Share) -> Tensor:
        """Return the smoothed mask (H, W) of a frame with the probabilities `pixels` (K, H, W)."""
        features, valid = _on_image(features, valid)
        cells = area_mean(pixels, (features.shape[-2], features.shape[-1]), valid)  # (K, h, w)
        change = self._propagator.blend(features, cells, self._share) - cells
        if not change.any():
            return own
        size = (pixels.shape[-2], pixels.shape[-1])
        return pixels.add_(upsample(change[None], size, valid)[0]).max(dim=0).indices

    def _count(self, own: Tensor, smoothed: Tensor) -> np.ndarray:
        now = torch.stack([own, smoothed]).to(torch.uint8).cpu().numpy()
        if self._last is not None:
            self._changed += (now != self._last).sum(axis=(1, 2))
            self._compared += own.numel()
        self._last = now
        return now[1].copy()


def _large_frames(sizes: TrainedSizes | None) -> dict[str, str]:
    if sizes is None:
        return {}
    above = f"above {sizes.largest} pixels reduced to {sizes.typical}"
    return {"large_frames": f"{above} (resolution.longest not typed)"}


def _probabilities(scores: Tensor, mixture: bool) -> Tensor:
    """Return what `Prediction.logits` gives after a softmax, for one frame (K, H, W), in float32."""
    scores = scores.float()
    if mixture:
        return scores / scores.sum(0).clamp(min=torch.finfo(torch.float32).tiny)
    return scores.softmax(0)


def _on_image(features: Tensor, valid: Share) -> tuple[Tensor, Share]:
    """Return the cells of (C, h, w) that lie on the image at least in part, and the share of them that it covers."""
    height, width = features.shape[-2:]
    covered = (height * valid[0], width * valid[1])
    rows, columns = (math.ceil(cells - 1e-6) for cells in covered)
    return features[:, :rows, :columns], (covered[0] / rows, covered[1] / columns)


def _shares(length: int, cells: int, valid: float) -> Tensor:
    """Return the weights (cells, length) of the mean over each cell's pixels."""
    edges = (torch.arange(cells + 1, dtype=torch.float64) * length / (cells * valid)).clamp(max=length)
    pixels = torch.arange(length, dtype=torch.float64)
    ends, starts = edges[1:, None].minimum(pixels + 1), edges[:-1, None].maximum(pixels)
    overlap = (ends - starts).clamp(min=0)
    return overlap / overlap.sum(1, keepdim=True).clamp(min=1e-12)
