"""Training-free tracker: propagates labels between frames by the features of a frozen backbone."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.contracts import Backbone
from dinoseg.extensions.clips.videos import VOID
from dinoseg.extensions.tracking.grid.propagator import Propagator
from dinoseg.extensions.tracking.propagation.features import input_size, last_maps
from dinoseg.extensions.tracking.propagation.masks import ObjectChannels
from dinoseg.extensions.tracking.propagation.settings import DINOV3, PropagationSettings
from dinoseg.extensions.tracking.provenance import precision_of, weights_of
from dinoseg.extensions.tracking.state_form import TensorForm, check_state
from dinoseg.extensions.tracking.tracker import Autocast, Size, Tracker
from dinoseg.utils.errors import UserError

_FORMS = {
    "features": TensorForm(torch.float32, "F h w C"),
    "labels": TensorForm(torch.float32, "F h w L"),
    "ids": TensorForm(torch.int64, "L", 0, VOID - 1),
    "size": TensorForm(torch.int64, "2", 1),
    "seen": TensorForm(torch.int64, "1", 1),
}


class PropagationTracker(Tracker):
    """Tracker that propagates object masks through one video without training.

    Masks hold IDs 0 (background) to 254, not necessarily contiguous, and 255 for unknown pixels, which count as
    background. The first frame needs a mask, and its returned mask equals it. Objects in later masks are followed from
    that frame on.

    Args:
        backbone: frozen backbone in eval mode, on `device`; its last map is used.
        settings: resizing of frames and propagation of labels.
        device: device of the backbone.
        autocast: context manager factory of the precision.
        batch_size: frames per forward pass.
    """

    unread = ("slots", "resolution")
    unread_because = (
        "Label propagation has no slots (give resume=RUN of a model with head=slots), and resizes frames to "
        "tracker.short_side."
    )

    def __init__(
        self,
        backbone: Backbone,
        settings: PropagationSettings = DINOV3,
        *,
        device: torch.device | str = "cpu",
        autocast: Autocast = nullcontext,
        batch_size: int = 4,
    ) -> None:
        super().__init__(device=device, autocast=autocast, batch_size=batch_size)
        self._backbone = backbone
        self._protocol = settings
        self._propagator = Propagator(settings)
        self._objects = ObjectChannels(settings, backbone.patch_size)
        self._frames_seen = 0

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Return the settings that masks depend on besides frames and labels."""
        return {
            "kind": "propagation",
            "tracker": asdict(self._protocol),
            "backbone": {
                "weights": weights_of(self._backbone),
                "patch_size": self._backbone.patch_size,
                "layers": list(self._backbone.layers),
            },
            "precision": precision_of(self.autocast, self.device),
        }

    def describe(self, size: Size) -> str:
        """Describe the backbone's input size and grid for frames of `size` (H, W)."""
        patch = self._backbone.patch_size
        height, width = input_size(size, self._protocol, patch)
        text = f"the backbone gets them at {height} x {width}, on a grid of {height // patch} x {width // patch} cells"
        if height * width > 1.5 * size[0] * size[1]:
            key = f"tracker.short_side={self._protocol.short_side}"
            return f"{text}, enlarged to {key}: tracker.enlarge=false takes less time"
        if not self._protocol.enlarge and height * width <= size[0] * size[1]:
            finer = f"tracker.enlarge=true tracker.short_side={2 * min(size)}"
            return f"{text} ({finer} is finer, but at least four times slower)"
        return text

    @torch.no_grad()
    def track_batch(self, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Return the masks (H, W) uint8 of the next frames; `labels` has a mask or None for each.

        Raises:
            UserError: the first frame has no mask.
        """
        assert self.size is not None
        # the backbone sees each frame alone, so a batch is one pass; labels then go from frame to frame
        maps = last_maps(self._backbone, frames, self._protocol, self.device, self.autocast)
        masks: list[np.ndarray | Tensor] = []  # tensors are copied from the device at the end: no sync per frame
        for features, mask in zip(maps, labels, strict=True):
            grid = (features.shape[1], features.shape[2])
            first = self._frames_seen == 0
            if mask is None and first:
                raise UserError("The first frame has no mask. Give its mask, whose objects are tracked.")
            # a later mask adds a channel for each new object, which is followed from here on
            seeds = None if mask is None else self._objects.labels(mask, grid, self._frames_seen).to(self.device)
            # the soft labels are what later frames read; the mask below is for output alone
            soft = self._propagator.step(features, seeds)  # (L, h, w)
            self._frames_seen += 1
            if mask is not None and first:  # the given mask is exact; propagation would return it at grid resolution
                masks.append(without_void(mask))
            else:
                masks.append(self._objects.winners(soft, self.size))
        return [each if isinstance(each, np.ndarray) else self._objects.mask(each) for each in masks]

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that the next frame depends on; empty before the first frame."""
        if self.size is None:
            return {}
        counts = {"ids": self._objects.ids, "size": self.size, "seen": [self._frames_seen]}
        return self._propagator.state() | {name: torch.tensor(value) for name, value in counts.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state()` of a tracker with the same settings.

        Raises:
            ValueError: the state is invalid.
        """
        if state:
            check_state(state, _FORMS)
            if len(set(state["ids"].tolist())) < state["ids"].numel() or state["ids"][0]:
                raise ValueError("ids do not start with the background, or repeat an object")
        self._propagator.load({name: state[name].to(self.device) for name in ("features", "labels") if state})
        self._objects.ids = state["ids"].tolist() if state else [0]
        self.size = tuple(state["size"].tolist()) if state else None
        self._frames_seen = int(state["seen"]) if state else 0


def without_void(mask: np.ndarray) -> np.ndarray:
    """Return a mask's IDs (H, W) uint8, with void replaced by background."""
    return np.where(mask == VOID, 0, mask).astype(np.uint8)
