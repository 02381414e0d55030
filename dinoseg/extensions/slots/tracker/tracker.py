"""Slot tracker: follows the slots of a video's first frame through later frames."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.geometry import valid_share
from dinoseg.extensions.clips.videos import VOID
from dinoseg.extensions.slots.contract import slots_of
from dinoseg.extensions.slots.head.background import background_mask
from dinoseg.extensions.slots.tracker.appearance import Appearance
from dinoseg.extensions.slots.tracker.matching import Correspondence, winners
from dinoseg.extensions.slots.tracker.propagation import SlotFrame, SlotPropagator, SlotState
from dinoseg.extensions.slots.tracker.settings import SlotTracking
from dinoseg.extensions.tracking.provenance import model_settings, precision_of
from dinoseg.extensions.tracking.state_form import TensorForm, check_state
from dinoseg.extensions.tracking.tracker import Autocast, LabelledFrames, Tracker
from dinoseg.models.model import SegmentationModel
from dinoseg.utils.devices import to_device
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import join_names

logger = logging.getLogger(__name__)

_FORMS = {
    "slots": TensorForm(None, "1 S D"),
    "masks": TensorForm(torch.float32, "S h w", 0),
    "path": TensorForm(torch.float64, "S S", 0),
    "successors": TensorForm(torch.int64, "S", 0),
    "ids": TensorForm(torch.int64, "S", 0, VOID),
    "sizes": TensorForm(torch.int64, "G", 0),
    "labelled": TensorForm(torch.int64, "1", 0, 1),
    "frame": TensorForm(torch.int64, "2", 1),
    "background": TensorForm(torch.int64, "1", 0),
}
_APPEARANCE = {  # additional tensors with match=appearance
    "won": TensorForm(torch.float64, "S C"),
    "cells": TensorForm(torch.float64, "S", 0),
    "moments": TensorForm(torch.float64, "2 C"),
    "whole": TensorForm(torch.int64, "1", 0, 1),
}


class SlotTracker(Tracker):
    """Tracker that follows the slots of a trained model through one video.

    Without labels, masks state the first-frame slot that a pixel belongs to: ID s + 1 for slot s. With a mask of the
    first frame, they hold the IDs of its objects (1 to 254), and 0 for the background; 255 in labels counts as
    background. The mask returned for a labelled frame is the slots' own segmentation, which includes appearance with
    `match=appearance`.

    Later masks only add new objects. Each gets the slot that overlaps it most, taken from the background while that has
    at least two, see `give`. New objects require a mask of the first frame, which may be all zeros.

    A video has the head's number of slots (`head.num_slots`), or with `lock_on` the number in the settings. Any head
    supports this, because slots are sampled from one distribution, or one per group. With groups, slots of objects and
    extra slots belong to the foreground group.

    Args:
        model: a segmenter with a slot head, in eval mode and on its device.
        settings: binding and matching of slots.
        batch_size: frames per backbone pass; slots process frames one by one.
        autocast: context manager factory of the precision.

    Raises:
        UserError: the head has no slots, or the backbone lacks the class attention that the settings need.
    """

    unread = ("tracker",)
    unread_because = "Slots are tracked by the settings of slots=..."

    def __init__(
        self,
        model: SegmentationModel,
        settings: SlotTracking = SlotTracking(),  # noqa: B008 (frozen)
        *,
        batch_size: int = 4,
        autocast: Autocast = nullcontext,
    ) -> None:
        super().__init__(device=next(model.parameters()).device, autocast=autocast, batch_size=batch_size)
        self._model, self._slot_settings = model, settings
        slots = slots_of(model)
        if not model.backbone.has_class_attention:
            _refuse_class_attention(settings)
        self._mask_source = slots.mask_source
        self._propagator = SlotPropagator(slots, settings, autocast)
        self._state: SlotState | None = None
        self._known: Appearance | None = None  # of the whole video, after a first pass

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """Return the settings that masks depend on besides frames and labels."""
        return {
            "kind": "slots",
            "slots": self._slot_settings.effective(),
            "model": model_settings(self._model),
            "precision": precision_of(self.autocast, self.device),
        }

    @torch.inference_mode()
    def track_batch(self, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        """Return the masks (H, W) uint8 of the next frames; `labels` has a mask or None for each.

        Raises:
            UserError: an ID is invalid; labels are given for a video whose first frame had none, or are missing
                although `lock_on` needs them; there are more objects than slots; or `passes` is 2 and `look_ahead` was
                not called.
        """
        if self._slot_settings.passes == 2 and self._state is None and self._known is None:
            raise UserError(
                "slots.passes=2 needs the whole video before its first frame: call look_ahead(...) with it before "
                "track(...), or give slots.passes=1."
            )
        assert self.size is not None
        begins = self._state is None
        # the masks of a batch are copied from the device together
        shown = [ids[winners(masks, self.size, valid)] for masks, ids, valid in self._through(frames, labels)]
        found = list(torch.stack(shown).cpu().numpy())
        if begins and labels[0] is not None:
            other = [] if self._slot_settings.lock_on else ["slots=lock_on"]
            other += ["head.mask_source=attention"] * (self._mask_source == "alpha")
            _warn_of_missing(labels[0], found[0], other)
        return found

    @torch.inference_mode()
    def look_ahead(self, video: Callable[[], Iterable[LabelledFrames]]) -> None:
        """Collect the slots' appearance over the whole video if `passes` is 2; otherwise only reset the tracker.

        Raises:
            UserError: see `track`.
        """
        self._state, self._known, self.size = None, None, None
        if self._slot_settings.passes == 1:
            return
        # a whole pass whose masks are dropped: only the appearance at its end counts
        for frames, labels in video():
            for batch in self.batches(frames, labels):
                for _ in self._through(*batch):
                    pass
        # the second pass starts as on a new video, but knows each slot's mean features from frame 0 on
        if self._state is not None and self._state.appearance is not None:
            self._known = replace(self._state.appearance, whole=True)
        self._state, self.size = None, None

    def _through(
        self, frames: Sequence[np.ndarray], labels: Sequence[np.ndarray | None]
    ) -> Iterator[tuple[Tensor, Tensor, tuple[float, float]]]:
        """Yield the soft masks (S, h, w) of each of the next frames, the slots' IDs (S,) uint8, and `valid`."""
        self._check_labels(labels)
        images = to_device(torch.from_numpy(np.stack(frames)), self.device).permute(0, 3, 1, 2)  # (B, 3, H, W)
        pixels = self._model.pixels(images)
        valid = valid_share((pixels.shape[-2], pixels.shape[-1]), self._model.patch_size)
        # the backbone takes the whole batch; a frame's slots need those of the frame before, so they go one by one
        features, background = self._features(pixels)
        for number, mask in enumerate(labels):
            frame = SlotFrame(
                features[number : number + 1],
                None if background is None else background[number],
                None if mask is None else np.where(mask == VOID, 0, mask).astype(np.uint8),
                valid,
            )
            if self._state is None:
                self._state, masks = self._propagator.start(frame, self._known)
            else:
                self._state, masks = self._propagator.step(self._state, frame)
            yield masks, torch.tensor(self._state.ids, dtype=torch.uint8, device=self.device), valid

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that the next frame depends on; empty before the first frame."""
        now = self._state
        if now is None or self.size is None:
            return {}
        tensors = {
            "slots": now.slots,
            "masks": now.masks,
            "path": now.correspondence.matrix,
            "successors": now.correspondence.successors,
        }
        counts = {"ids": now.ids, "sizes": now.sizes, "labelled": [int(now.labelled)], "frame": self.size}
        counts["background"] = [now.num_background]
        if now.appearance is not None:
            tensors |= {"won": now.appearance.sums, "cells": now.appearance.cells, "moments": now.appearance.moments}
            counts["whole"] = [int(now.appearance.whole)]
        # copies, because the tracker continues while another thread writes them
        return {name: value.clone() for name, value in tensors.items()} | {
            name: torch.tensor(value) for name, value in counts.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state()` of a tracker with the same settings.

        Raises:
            ValueError: the state is invalid.
        """
        self._state, self.size = None, None
        if not state:
            return
        by_appearance = self._slot_settings.match == "appearance"
        check_state(state, _FORMS | (_APPEARANCE if by_appearance else {}))
        if by_appearance and (int(state["whole"]) != self._slot_settings.passes - 1 or not state["cells"].any()):
            raise ValueError(f"whole and cells do not match slots.passes={self._slot_settings.passes}")
        slots = state["slots"].shape[1]
        # a permutation: each slot of the first frame has one of the current frame
        if sorted(state["successors"].tolist()) != list(range(slots)) or int(state["sizes"].sum()) != slots:
            raise ValueError(f"successors or sizes do not match {slots} slots")
        height, width = state["frame"].tolist()
        self.size = (height, width)
        self._state = SlotState(
            slots=state["slots"].to(self.device, copy=True),
            masks=state["masks"].to(self.device, copy=True),
            correspondence=Correspondence(state["path"].to("cpu", copy=True), state["successors"].to("cpu", copy=True)),
            ids=state["ids"].tolist(),
            labelled=bool(state["labelled"]),
            sizes=state["sizes"].tolist(),
            num_background=int(state["background"]),
            appearance=_appearance(state) if by_appearance else None,
        )

    def _features(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the backbone's last map (B, C, h, w) and, if needed, a mask of the background (B, h, w)."""
        asks = self._propagator.needs_background
        # maps alone where no slot is held: reading the attention hooks into the last block
        needed = asks(first=False) or (self._state is None and asks(first=True))
        with self.autocast():
            if not needed:
                return self._model.backbone(pixels)[-1], None
            maps, attention = self._model.backbone.with_class_attention(pixels)
        return maps[-1], background_mask(attention)

    def _check_labels(self, labels: Sequence[np.ndarray | None]) -> None:
        labelled = labels[0] is not None if self._state is None else self._state.labelled
        if self._slot_settings.lock_on and not labelled:
            raise UserError(
                "slots.lock_on=true initialises slots from the mask of the first frame, which is missing. Give it, or "
                "set slots.lock_on=false."
            )
        for mask in labels:
            if mask is None:
                continue
            if not labelled:
                raise UserError(
                    "There is a mask of a later frame, but not of the first, so the output ids are slot numbers. Give "
                    "a mask of the first frame (zeros if it has no object), or no masks."
                )
            if mask.dtype.kind not in "ui" or mask.min() < 0 or mask.max() > VOID:
                raise UserError(
                    f"A mask of type {mask.dtype} holds values from {mask.min()} to {mask.max()}: ids are whole "
                    f"numbers from 0 (background) to {VOID - 1}. Renumber the objects."
                )


def _warn_of_missing(given: np.ndarray, found: np.ndarray, remedies: Sequence[str]) -> None:
    """Warn about objects of the given mask that have no pixel in the slots' mask of the same frame."""
    ids = np.setdiff1d(np.unique(given), [0, VOID])
    unseen = [str(each) for each in np.setdiff1d(ids, found)]
    if unseen:
        logger.warning(
            "No slot covers the first mask's %s %s (of %d): another object wins its cells, or it is smaller than a "
            "cell. Set %sa larger head.num_slots or resolution, or train longer.",
            "object" if len(unseen) == 1 else "objects",
            join_names(unseen),
            len(ids),
            "".join(f"{remedy}, " for remedy in remedies),
        )


def _appearance(state: Mapping[str, Tensor]) -> Appearance:
    sums, cells, moments = (state[name].to("cpu", copy=True) for name in ("won", "cells", "moments"))
    return Appearance(sums, cells, moments, whole=bool(state["whole"]))


def _refuse_class_attention(settings: SlotTracking) -> None:
    """Check that no setting needs the class attention, which only a backbone with a class token has."""
    if settings.extra_slots:
        raise UserError(
            f"slots.extra_slots={settings.extra_slots} needs a backbone with a class token, whose attention separates "
            "the foreground. Set slots.extra_slots=0, or use a model with such a backbone."
        )
    if settings.lock_on and settings.hold != "none":
        raise UserError(
            f"slots.hold={settings.hold} with slots.lock_on=true needs a backbone with a class token, whose attention "
            "separates the background in later frames. Set slots.hold=none, or use a model with such a backbone."
        )


@dataclass(frozen=True)
class SlotFactory(SlotTracking):
    """Factory of trackers that follow the slots of a trained model; the arguments are those of `SlotTracking`."""

    def __call__(
        self,
        model: SegmentationModel,
        *,
        device: torch.device | str = "cpu",
        autocast: Autocast = nullcontext,
        batch_size: int = 4,
    ) -> Tracker:
        """Return a tracker; the model is on `device` already."""
        return SlotTracker(model, self, autocast=autocast, batch_size=batch_size)
