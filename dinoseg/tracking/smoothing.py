"""Less flicker in the masks of a trained segmenter: what a frame shows, mixed with what the frames before it say."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Prediction
from dinoseg.inference.trained_sizes import TrainedSizes, keep_scale
from dinoseg.models.model import Segmenter
from dinoseg.tracking.grid.cells import area_mean
from dinoseg.tracking.grid.propagator import Propagator
from dinoseg.tracking.grid.settings import MatchSettings
from dinoseg.tracking.provenance import model_settings, precision_of
from dinoseg.tracking.state_form import TensorForm, check_state
from dinoseg.tracking.tracker import Autocast, Tracker
from dinoseg.utils.errors import UserError
from dinoseg.utils.transfer import sent

_COUNTED = {"masks": TensorForm(torch.uint8, "2 H W"), "counts": TensorForm(torch.int64, "3", 0)}
_PROPAGATED = {
    "features": TensorForm(torch.float32, "F h w C"),
    "labels": TensorForm(torch.float32, "F h w K"),
}
_READ = {field.name for field in fields(MatchSettings)}  # of the settings: a segmenter resizes frames by itself
Share = tuple[float, float]


def with_features(model: Segmenter, images: Tensor) -> tuple[Prediction, Tensor]:
    """Return a prediction for images (B, 3, H, W) and, of the same pass, the backbone's last map (B, C, h, w).

    A head that runs the blocks itself asks for no maps: then it is the patch tokens that left the final norm last, of
    which it read its masks.
    """
    # such a head norms after several blocks: only the last output is kept, which is also what its last masks are of
    outputs: dict[str, Tensor] = {}
    hooks = [model.backbone.register_forward_hook(lambda *call: outputs.update(last_map=call[2][-1]))]
    if model.backbone.norm is not None:
        hooks.append(model.backbone.norm.register_forward_hook(lambda *call: outputs.update(tokens=call[2])))
    try:
        prediction = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    if "last_map" in outputs:
        return prediction, outputs["last_map"]
    size = model.seen_size((images.shape[-2], images.shape[-1]))
    grid = (math.ceil(size[0] / model.patch_size), math.ceil(size[1] / model.patch_size))
    return prediction, outputs["tokens"][:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


class SmoothingTracker(Tracker):
    """Masks of one video by a trained segmenter, in which a frame's class probabilities lean on the frames before it.

    On the feature grid, `smoothing` of the probabilities comes from label propagation and the rest from the frame; that
    is what later frames read. Pixels take over the change alone, enlarged bilinearly, so that they keep their own
    detail; a `smoothing` of 0 gives the segmenter's own masks. What it keeps is that of a Propagator, and two masks.

    Args:
        model: in eval mode, on its device.
        settings: of the matches by which the frames before say what a cell is.
        smoothing: share of a frame's probabilities that comes from the frames before it, 0 to 1.
        sizes: of its training, to which larger frames are reduced; None: they are not.
        autocast: gives the precision's context for a forward pass.
        batch_size: frames that the model sees at once.

    Raises:
        UserError: `smoothing` is no share.
    """

    unread_because = (
        "Smoothing has no slots, and a segmenter resizes frames as resolution.scale and resolution.longest say."
    )

    def __init__(
        self,
        model: Segmenter,
        settings: MatchSettings = MatchSettings(),  # noqa: B008 (frozen)
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
        super().__init__(device=next(model.parameters()).device, autocast=autocast, batch_size=batch_size)
        self._model, self._share, self._sizes = model, smoothing, sizes
        keep_scale(model, sizes)
        self._propagator = Propagator(settings)
        self._matching = {key: value for key, value in asdict(settings).items() if key in _READ}
        self.unread = (
            "slots",
            "resolution.crop",
            *(f"tracker.{field.name}" for field in fields(settings) if field.name not in _READ),
        )
        self._last: np.ndarray | None = None  # (2, H, W): the segmenter's own mask, and the smoothed one
        self._changed = np.zeros(2, np.int64)  # pixels, of the one and of the other
        self._compared = 0

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """What the masks depend on beside frames and labels."""
        return {
            "kind": "smoothing",
            "smoothing": self._share,
            "tracker": self._matching,
            "model": model_settings(self._model),
            "precision": precision_of(self.autocast, self.device),
            **_large_frames(self._sizes),
        }

    @torch.no_grad()
    def track_batch(self, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Return the class ids (H, W) uint8 of the next frames.

        Raises:
            UserError: labels are given.
        """
        if any(mask is not None for mask in labels):
            raise UserError(
                "labels are given, but a trained segmenter finds its classes by itself. Leave labels out; or leave "
                "resume out to follow the objects of a mask."
            )
        images = sent(torch.from_numpy(np.stack(frames)), self.device).permute(0, 3, 1, 2).contiguous()  # (B, 3, H, W)
        with self.autocast():
            prediction, features = with_features(self._model, images)
        scores = prediction.scores()  # (B, K, H, W)
        masks = []
        for mask, frame, cells in zip(scores.max(dim=1).indices, scores, features, strict=True):
            smoothed = mask
            if self._share:
                probabilities = _probabilities(frame, prediction.mixture)
                smoothed = self._smoothed(mask, probabilities, cells, prediction.valid)
            masks.append(self._counted(mask, smoothed))
        return masks

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
        self._propagator.load({key: state[key].to(self.device) for key in needed})
        self._last = state["masks"].cpu().numpy().copy() if state else None
        self.size = None if self._last is None else (self._last.shape[1], self._last.shape[2])
        counts = state["counts"].tolist() if state else [0, 0, 0]
        self._changed, self._compared = np.array(counts[:2], np.int64), int(counts[2])

    def _smoothed(self, mask: Tensor, pixels: Tensor, features: Tensor, valid: Share) -> Tensor:
        """Return the smoothed mask (H, W) of a frame with the probabilities `pixels` (K, H, W)."""
        features, valid = _on_image(features, valid)
        cells = area_mean(pixels, (features.shape[-2], features.shape[-1]), valid)  # (K, h, w)
        change = self._propagator.blend(features, cells, self._share) - cells
        if not change.any():
            return mask
        size = (pixels.shape[-2], pixels.shape[-1])
        return pixels.add_(upsample(change[None], size, valid)[0]).max(dim=0).indices

    def _counted(self, mask: Tensor, smoothed: Tensor) -> np.ndarray:
        """Return the smoothed mask, and count the pixels of both that are of another class than in the last frame."""
        now = torch.stack([mask, smoothed]).to(torch.uint8).cpu().numpy()
        if self._last is not None:
            self._changed += (now != self._last).sum(axis=(1, 2))
            self._compared += mask.numel()
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
