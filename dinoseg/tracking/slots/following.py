"""Slots taken from frame to frame, and what each of them stands for."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoseg.contracts import Slots
from dinoseg.data.clips.videos import VOID
from dinoseg.errors import UserError
from dinoseg.tracking.grid.cells import area_mean
from dinoseg.tracking.slots.appearance import Appearance
from dinoseg.tracking.slots.locking import hold, lock
from dinoseg.tracking.slots.matching import Correspondence, cosine, give, overlap, owners, soft_iou
from dinoseg.tracking.slots.settings import SlotTracking
from dinoseg.tracking.tracker import Autocast


class SlotFrame(NamedTuple):
    """What is known of a frame before slots see it."""

    features: Tensor  # (1, C, h, w)
    background: Tensor | None  # (h, w) bool: what the class attention does not look at
    labels: np.ndarray | None  # (H, W) ids, 0 = background
    valid: tuple[float, float]  # share of the grid's height and width that the frame covers

    def ids(self) -> list[int]:
        """Return the objects in the labels, ascending."""
        return [] if self.labels is None else [int(one) for one in np.unique(self.labels) if one]

    def shares(self, ids: Sequence[int]) -> Tensor:
        """Return the share of each cell that the pixels of each id cover (K, h, w): of a small object little, not none.

        One id at a time is held at full size, as 4-byte numbers.
        """
        grid = (self.features.shape[-2], self.features.shape[-1])
        labels = torch.from_numpy(np.asarray(self.labels))
        objects = ((labels == label).float() for label in ids)
        return torch.cat([area_mean(pixels[None], grid, self.valid) for pixels in objects]).to(self.features.device)


@dataclass(frozen=True)
class Followed:
    """All that the next frame depends on."""

    slots: Tensor  # (1, S, D) of the last frame
    masks: Tensor  # (S, h, w) of the last frame, float32
    correspondence: Correspondence
    ids: list[int]  # (S,) what each slot of the first frame is in the masks
    labelled: bool  # whether these are ids of labels
    sizes: list[int]  # slots in each of the head's groups
    num_background: int  # of these, the first, kept to the background; with `lock_on` without groups too
    appearance: Appearance | None  # of what slots of the first frame have won, where they are followed by it


class Follower:
    """Takes a slot head from frame to frame.

    Args:
        head: in eval mode.
        settings: how slots are bound and followed.
        autocast: gives the precision's context for a forward pass.
    """

    def __init__(self, head: Slots, settings: SlotTracking, autocast: Autocast = nullcontext) -> None:
        self._head, self._settings, self._autocast = head, settings, autocast

    def asks_background(self, *, first: bool) -> bool:
        """Return whether a video's first frame, or each later one, is to come with its `background`."""
        holds = self._settings.hold != "none"
        if first:
            return (holds and self._head.groups != "off") or self._settings.extra_slots > 0
        return holds and (self._head.groups == "always" or self._settings.lock_on)

    def begin(self, frame: SlotFrame) -> Followed:
        """Return what the first frame's slots stand for: as its labels say, or each for itself.

        Raises:
            UserError: more slots than ids, or more objects than slots.
        """
        sizes, num_background, allowed = list(self._head.sizes), 0, None
        if len(sizes) == 2:
            num_background = sizes[0]
            allowed = None if frame.background is None else hold(frame.background, sizes, self._settings.hold)
        if frame.labels is None:
            slots, masks = self._see(frame, None, allowed, sizes)
            return self._begun(frame, slots, masks, _numbered(len(masks)), sizes, num_background)
        ids = [0, *frame.ids()]
        shares = frame.shares(ids)
        if self._settings.lock_on:
            locked = lock(shares, ids, self._settings, frame.background)
            num_background, count = locked.num_background, len(locked.serves)
            # extra slots count as background in masks, but see foreground: they are drawn as those of objects are
            sizes = [num_background, count - num_background] if len(sizes) == 2 else [count]
            allowed = locked.allowed[None]
        slots, masks = self._see(frame, None, allowed, sizes)
        serves = locked.serves if self._settings.lock_on else owners(masks, shares, ids)
        return self._begun(frame, slots, masks, serves, sizes, num_background)

    def go_on(self, last: Followed, frame: SlotFrame) -> Followed:
        """Return where the slots of the last frame are in this one, whose new objects get a slot each.

        Raises:
            UserError: no slot is left for a new object.
        """
        allowed = None
        if frame.background is not None and self.asks_background(first=False):
            groups = (last.num_background, len(last.ids) - last.num_background)
            allowed = hold(frame.background, groups, self._settings.hold)
        slots, masks = self._see(frame, last.slots, allowed, last.sizes)
        correspondence, appearance = last.correspondence, last.appearance
        if appearance is not None:
            appearance, successors = appearance.step(frame.features[0], masks, frame.valid, correspondence.successors)
            correspondence = replace(correspondence, successors=successors)
        elif self._settings.match == "similarity":
            correspondence = correspondence.step(cosine(last.slots[0], slots[0]), self._settings.temperature)
        elif self._settings.match == "soft_iou":
            correspondence = correspondence.step(soft_iou(last.masks, masks), self._settings.temperature)
        # auto: slots that the head carries over keep their order, those that are drawn anew have none
        elif self._settings.match == "overlap" or self._head.predictor is None:
            correspondence = correspondence.step(overlap(last.masks, masks), self._settings.temperature)
        ids = list(last.ids)
        new = [one for one in frame.ids() if one not in ids]
        if new:
            now = masks[correspondence.successors.to(masks.device)]  # (S, h, w) in the order of the first frame
            give(ids, dict(zip(new, soft_iou(frame.shares(new), now).cpu().numpy(), strict=True)))
        return replace(last, slots=slots, masks=masks, correspondence=correspondence, ids=ids, appearance=appearance)

    def _begun(
        self, frame: SlotFrame, slots: Tensor, masks: Tensor, ids: list[int], sizes: list[int], num_background: int
    ) -> Followed:
        by_looks = self._settings.match == "appearance"
        return Followed(
            slots=slots,
            masks=masks,
            correspondence=Correspondence.start(len(masks)),
            ids=ids,
            labelled=frame.labels is not None,
            sizes=sizes,
            num_background=num_background,
            appearance=Appearance.start(frame.features[0], masks, frame.valid) if by_looks else None,
        )

    def _see(
        self, frame: SlotFrame, slots: Tensor | None, allowed: Tensor | None, sizes: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the slots (1, S, D) of a frame and their soft masks (S, h, w) in float32."""
        grid = (frame.features.shape[-2], frame.features.shape[-1])
        with self._autocast():
            slots, attention = self._head.step(frame.features, slots, allowed, sizes)
            masks = self._head.masks(slots, attention, grid)[0].float()
        if not (slots.isfinite().all() and masks.isfinite().all()):
            raise UserError(
                "A frame's slots hold values that are not finite, and would spread to all frames after it. Run the "
                "model in float32 (engine.precision=fp32)."
            )
        return slots, masks


def _numbered(num_slots: int) -> list[int]:
    """Return an id of its own for each slot."""
    if num_slots >= VOID:
        raise UserError(
            f"head.num_slots={num_slots} do not fit into masks of ids 1 to {VOID - 1}. Use a model of fewer slots, or "
            "give the mask of the first frame, whose objects several slots may serve."
        )
    return list(range(1, num_slots + 1))
