"""Base class of trackers of a trained segmenter, which compare the features of its own forward pass."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.shapes import Prediction
from dinoseg.extensions.tracking.grid.settings import MatchSettings
from dinoseg.extensions.tracking.provenance import model_settings, precision_of
from dinoseg.extensions.tracking.tracker import Autocast, Tracker
from dinoseg.inference.trained_sizes import TrainedSizes, limit_to_trained_size
from dinoseg.models.model import SegmentationModel
from dinoseg.utils.devices import to_device
from dinoseg.utils.errors import UserError

Share = tuple[float, float]


class SegmenterTracker(Tracker):
    """Base class of trackers that segment each frame and relate it to earlier ones by label propagation.

    Args:
        model: segmenter in eval mode, on its device.
        settings: matching between a cell and the cells of earlier frames.
        sizes: image sizes of its training, to which larger frames are reduced; None: no reduction.
        autocast: context manager factory of the precision.
        batch_size: frames per forward pass.
        unread: further keys of `settings` that have no effect.
    """

    unread_because = (
        "Smoothing and identities use no slots, and a segmenter resizes frames by resolution.scale and "
        "resolution.longest."
    )

    def __init__(
        self,
        model: SegmentationModel,
        settings: MatchSettings,
        *,
        sizes: TrainedSizes | None = None,
        autocast: Autocast = nullcontext,
        batch_size: int = 4,
        unread: Sequence[str] = (),
    ) -> None:
        super().__init__(device=next(model.parameters()).device, autocast=autocast, batch_size=batch_size)
        self._model, self._sizes = model, sizes
        limit_to_trained_size(model, sizes)
        used = {field.name for field in fields(MatchSettings)} - {*unread}
        self._matching = {key: value for key, value in asdict(settings).items() if key in used}
        idle = (field.name for field in fields(settings) if field.name not in used)
        self.unread = ("slots", "resolution.crop", *(f"tracker.{name}" for name in idle))

    def _common_settings(self) -> dict[str, Any]:
        """Return the settings that masks of all such trackers depend on."""
        common = {
            "tracker": self._matching,
            "model": model_settings(self._model),
            "precision": precision_of(self.autocast, self.device),
        }
        if self._sizes is not None:
            above = f"above {self._sizes.largest} pixels reduced to {self._sizes.typical}"
            common["large_frames"] = f"{above} (resolution.longest not set)"
        return common

    def _predict(self, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]) -> tuple[Prediction, Tensor]:
        """Return the prediction and the last map (B, C, h, w) of frames.

        Raises:
            UserError: labels are given.
        """
        if any(mask is not None for mask in labels):
            raise UserError(
                "labels are given, but a trained segmenter needs no masks. Leave labels out; or leave resume out to "
                "track the objects of a mask."
            )
        images = (
            to_device(torch.from_numpy(np.stack(frames)), self.device).permute(0, 3, 1, 2).contiguous()
        )  # (B, 3, H, W)
        with self.autocast():
            return with_features(self._model, images)


def with_features(model: SegmentationModel, images: Tensor) -> tuple[Prediction, Tensor]:
    """Return a prediction for images (B, 3, H, W) and the backbone's last map (B, C, h, w) of the same pass.

    A head that runs the blocks itself requests no maps. The map then consists of the patch tokens of the last
    final-norm call, from which the head predicted its masks.
    """
    # such a head applies the norm after several blocks; its final masks come from the last call
    outputs: dict[str, Tensor] = {}
    # hooks read the maps of the pass that predicts; a pass of their own would double the time of the backbone
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
    size = model.input_size((images.shape[-2], images.shape[-1]))
    grid = (math.ceil(size[0] / model.patch_size), math.ceil(size[1] / model.patch_size))
    return prediction, outputs["tokens"][:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


def crop_to_image(features: Tensor, valid: Share) -> tuple[Tensor, Share]:
    """Return the cells of (C, h, w) that overlap the image, and the fraction of them (height, width) that it covers."""
    height, width = features.shape[-2:]
    covered = (height * valid[0], width * valid[1])
    # the tolerance is for rounding errors of the product, which would add a row of padding
    rows, columns = (math.ceil(cells - 1e-6) for cells in covered)
    return features[:, :rows, :columns], (covered[0] / rows, covered[1] / columns)
