"""Objects followed through a video by what a frozen backbone sees: label propagation from frames to masks."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dinoseg.data.clips.videos import VOID
from dinoseg.errors import UserError
from dinoseg.model import Segmenter, fingerprint
from dinoseg.tracking.frame_features import Autocast, last_maps, precision_of
from dinoseg.tracking.frame_size import input_size, one_size
from dinoseg.tracking.propagation.masks import first_labels, to_mask
from dinoseg.tracking.propagation.propagator import Propagator
from dinoseg.tracking.propagation.settings import DINOV3, Settings
from dinoseg.tracking.tracker import TensorForm, check_state
from dinoseg.wording import listed

logger = logging.getLogger(__name__)
_FORMS = {
    "features": TensorForm(torch.float32, "F h w C"),
    "labels": TensorForm(torch.float32, "F h w L"),
    "ids": TensorForm(torch.int64, "L", 0, VOID - 1),
    "size": TensorForm(torch.int64, "2", 1),
    "seen": TensorForm(torch.int64, "1", 1),
}


class PropagationTracker:
    """Follow the objects of masks through one video; nothing is trained.

    Masks hold ids 0 (background) to 254, not necessarily all of them, and 255 where no object is known, which counts
    as background. The first frame needs a mask, and gets it back; the objects of a later one are followed from there.

    Args:
        backbone: frozen and in eval mode, on `device`; its last map is used.
        settings: how frames are resized and labels propagated.
        device: where the backbone is.
        autocast: gives the precision's context for a forward pass.
        batch_size: frames that the backbone sees at once.
    """

    def __init__(
        self,
        backbone: nn.Module,
        settings: Settings = DINOV3,
        *,
        device: torch.device | str = "cpu",
        autocast: Autocast = nullcontext,
        batch_size: int = 4,
    ) -> None:
        self._backbone: Any = backbone
        self._protocol = settings
        self._device = torch.device(device)
        self._autocast = autocast
        self._batch_size = batch_size
        self._propagator = Propagator(settings)
        self._ids = [0]  # the mask's id of each channel
        self._size: tuple[int, int] | None = None  # of frames
        self._seen = 0

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """What the masks depend on beside frames and labels."""
        return {
            "kind": "propagation",
            "tracker": asdict(self._protocol),
            "backbone": {
                "weights": weights_of(self._backbone),
                "patch_size": self._backbone.patch_size,
                "layers": list(getattr(self._backbone, "layers", [])),
            },
            "precision": precision_of(self._autocast, self._device),
        }

    def blocks(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Return the grid (h, w) whose cells are seen as blocks in masks of frames of `size` (H, W); None: none are."""
        if self._protocol.upsample != "nearest":
            return None
        height, width = input_size(size, self._protocol, self._backbone.patch_size)
        return height // self._backbone.patch_size, width // self._backbone.patch_size

    @torch.no_grad()
    def track(self, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Return the masks (H, W) uint8 of the next frames (H, W, 3) uint8 RGB; `labels` has a mask or None for each.

        The same frames in other batches give the same masks but for rounding.

        Raises:
            UserError: the first frame has no mask, or a frame or a mask is of another size than the first frame.
        """
        masks = []
        for start in range(0, len(frames), self._batch_size):
            batch = slice(start, start + self._batch_size)
            self._size = one_size(self._size, frames[batch], labels[batch])
            maps = last_maps(self._backbone, frames[batch], self._protocol, self._device, self._autocast)
            for features, mask in zip(maps, labels[batch], strict=True):
                masks.append(self._step(features, mask))
        return masks

    def state(self) -> dict[str, Tensor]:
        """Return all that the next frame depends on; empty before the first."""
        if self._size is None:
            return {}
        counts = {"ids": self._ids, "size": self._size, "seen": [self._seen]}
        return self._propagator.state() | {name: torch.tensor(value) for name, value in counts.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state()` of a tracker with the same settings.

        Raises:
            ValueError: it is no such state.
        """
        if state:
            check_state(state, _FORMS)
            if len(set(state["ids"].tolist())) < state["ids"].numel() or state["ids"][0]:
                raise ValueError("ids do not begin with the background, or name an object twice")
        moved = {name: state[name].to(self._device) for name in ("features", "labels") if state}
        self._propagator.load(moved)
        self._ids = state["ids"].tolist() if state else [0]
        self._size = tuple(state["size"].tolist()) if state else None
        self._seen = int(state["seen"]) if state else 0

    def _step(self, features: Tensor, mask: np.ndarray | None) -> np.ndarray:
        assert self._size is not None
        given = None if mask is None else self._labels(mask, (features.shape[1], features.shape[2]))
        if given is None and not self._seen:
            raise UserError("The first frame has no mask. Give it: its objects are what is followed.")
        soft = self._propagator.step(features, given)  # (L, h, w)
        self._seen += 1
        if mask is not None and self._seen == 1:
            return np.where(mask == VOID, 0, mask).astype(np.uint8)
        channels = to_mask(soft, self._size, self._protocol, patch_size=self._backbone.patch_size)
        return np.array(self._ids, np.uint8)[channels.cpu().numpy()]

    def _labels(self, mask: np.ndarray, grid: tuple[int, int]) -> Tensor:
        """Return a mask's labels (L, h, w): objects new to the tracker get channels of their own."""
        here = [int(label) for label in np.unique(mask) if label not in (0, VOID)]
        self._ids += [label for label in here if label not in self._ids]
        channel = np.zeros(256, np.uint8)
        channel[self._ids] = range(len(self._ids))
        labels = first_labels(torch.from_numpy(channel[mask]), grid, self._protocol, num_labels=len(self._ids))
        lost = [str(label) for label in here if not labels[self._ids.index(label)].any()]
        if lost:
            logger.warning(
                "Frame %d: too small to lie under the centre of a grid cell, and so not followed: object %s. Give a "
                "larger tracker.short, or tracker.first=bilinear.",
                self._seen,
                listed(lost),
            )
        return labels.to(self._device)


def weights_of(module: nn.Module) -> str:
    """Return the fingerprint of a module's parameters and buffers."""
    return fingerprint((*module.named_parameters(), *module.named_buffers()))


def model_settings(model: Segmenter) -> dict[str, Any]:
    """Return what a segmenter's outputs depend on beside the pixels, in plain values."""
    return {"weights": weights_of(model), "scale": model.scale, "longest": model.longest}
