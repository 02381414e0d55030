"""Frame-to-frame propagation of slots, and their assignment to objects."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinoseg.extensions.clips.videos import VOID
from dinoseg.extensions.slots.contract import Slots
from dinoseg.extensions.slots.tracker.appearance import Appearance
from dinoseg.extensions.slots.tracker.matching import Correspondence, assign_slots, cosine, overlap, owners
from dinoseg.extensions.slots.tracker.settings import SlotTracking
from dinoseg.extensions.tracking.grid.cells import area_mean, soft_iou
from dinoseg.extensions.tracking.tracker import Autocast
from dinoseg.utils.errors import UserError


class SlotFrame(NamedTuple):
    """Inputs of the slots for one frame."""

    features: Tensor  # (1, C, h, w)
    background: Tensor | None  # (h, w) bool: cells that the class attention ignores
    labels: np.ndarray | None  # (H, W) IDs, 0 = background
    valid: tuple[float, float]  # fraction of the grid's height and width that the frame covers

    def ids(self) -> list[int]:
        """Return the object IDs in the labels, ascending."""
        return [] if self.labels is None else [int(one) for one in np.unique(self.labels) if one]

    def shares(self, ids: Sequence[int]) -> Tensor:
        """Return the fraction (K, h, w) of each cell that the pixels of each ID cover, above 0 for small objects too.

        Only one ID at a time is expanded to full size, as float32.
        """
        grid = (self.features.shape[-2], self.features.shape[-1])
        labels = torch.from_numpy(np.asarray(self.labels))
        objects = ((labels == label).float() for label in ids)
        return torch.cat([area_mean(pixels[None], grid, self.valid) for pixels in objects]).to(self.features.device)


@dataclass(frozen=True)
class SlotState:
    """State of the slots that the next frame depends on."""

    slots: Tensor  # (1, S, D) of the last frame
    masks: Tensor  # (S, h, w) of the last frame, float32
    correspondence: Correspondence
    ids: list[int]  # (S,) the ID in the masks of each slot of the first frame
    labelled: bool  # whether the IDs come from labels
    sizes: list[int]  # number of slots in each of the head's groups
    num_background: int  # number of leading slots restricted to the background; `lock_on` sets it without groups too
    appearance: Appearance | None  # of the first frame's slots; None unless match=appearance


class SlotPropagator:
    """Propagation of a slot head's slots from frame to frame.

    Args:
        head: slot head in eval mode.
        settings: binding and matching of slots.
        autocast: context manager factory of the precision.
    """

    def __init__(self, head: Slots, settings: SlotTracking, autocast: Autocast = nullcontext) -> None:
        self._head, self._settings, self._autocast = head, settings, autocast

    def needs_background(self, *, first: bool) -> bool:
        """Return whether the first frame of a video, or each later frame, needs its `background`."""
        holds = self._settings.hold != "none"
        if first:
            return (holds and self._head.groups != "off") or self._settings.extra_slots > 0
        return holds and (self._head.groups == "always" or self._settings.lock_on)

    def start(self, frame: SlotFrame, known: Appearance | None = None) -> tuple[SlotState, Tensor]:
        """Process the first frame: return the state, with each slot's ID from the labels or its number, and the masks.

        Masks are (S, h, w) in the order of the first frame's slots; with match=appearance, they take it into account.

        Args:
            frame: the first frame.
            known: appearance of the slots over the whole video, from a first pass; None: there was none.

        Raises:
            UserError: there are more slots than IDs, or more objects than slots.
        """
        sizes = list(self._head.sizes)
        num_background = 0
        allowed = None
        if len(sizes) == 2:
            num_background = sizes[0]
            allowed = None if frame.background is None else hold(frame.background, sizes, self._settings.hold)
        ids = [0, *frame.ids()]
        shares = None
        serves = None
        if frame.labels is not None:
            # by area, not by cell centres: an object smaller than a cell has a share, and so a slot
            shares = frame.shares(ids)
            if self._settings.lock_on:
                lock_on = lock(shares, ids, self._settings, frame.background)
                num_background, serves = lock_on.num_background, lock_on.serves
                # extra slots count as background in masks but see foreground: they are sampled like those of objects
                sizes = [num_background, len(serves) - num_background] if len(sizes) == 2 else [len(serves)]
                allowed = lock_on.allowed[None]
        slots, masks = self._run_head(frame, None, allowed, sizes)
        if known is None and self._settings.match == "appearance":
            known = Appearance.empty(len(masks), frame.features.shape[1])
        locked = serves is not None  # each slot sees only its object, so appearance must not reassign slots
        start = Correspondence.start(len(masks))
        correspondence, appearance, shown = self._match(frame, masks, start, known, same=locked)
        if serves is None:
            serves = _slot_ids(len(masks)) if shares is None else owners(shown, shares, ids)
        state = SlotState(
            slots=slots,
            masks=masks,
            correspondence=correspondence,
            ids=serves,
            labelled=frame.labels is not None,
            sizes=sizes,
            num_background=num_background,
            appearance=appearance,
        )
        return state, shown

    def step(self, last: SlotState, frame: SlotFrame) -> tuple[SlotState, Tensor]:
        """Process a later frame: return the state, with a slot for each new object, and the masks (S, h, w).

        Raises:
            UserError: no slot is left for a new object.
        """
        allowed = None
        if frame.background is not None and self.needs_background(first=False):
            groups = (last.num_background, len(last.ids) - last.num_background)
            allowed = hold(frame.background, groups, self._settings.hold)
        # masks in the order of this frame's slots: `_match` brings them to that of the first frame
        slots, masks = self._run_head(frame, last.slots, allowed, last.sizes)
        correspondence, match = last.correspondence, self._settings.match
        if match == "similarity":
            correspondence = correspondence.step(cosine(last.slots[0], slots[0]), self._settings.temperature)
        elif match == "soft_iou":
            correspondence = correspondence.step(soft_iou(last.masks, masks), self._settings.temperature)
        # auto: slots that the head propagates keep their order; those sampled in each frame have none
        elif match == "overlap" or (match == "auto" and self._head.predictor is None):
            correspondence = correspondence.step(overlap(last.masks, masks), self._settings.temperature)
        correspondence, appearance, shown = self._match(frame, masks, correspondence, last.appearance)
        ids = list(last.ids)
        # only these: the masks of earlier objects are those of their slots, whatever the labels show of them
        new = [one for one in frame.ids() if one not in ids]
        if new:
            assign_slots(ids, dict(zip(new, soft_iou(frame.shares(new), shown).cpu().numpy(), strict=True)))
        state = replace(last, slots=slots, masks=masks, correspondence=correspondence, ids=ids, appearance=appearance)
        return state, shown

    def _match(
        self,
        frame: SlotFrame,
        masks: Tensor,
        correspondence: Correspondence,
        known: Appearance | None,
        *,
        same: bool = False,
    ) -> tuple[Correspondence, Appearance | None, Tensor]:
        """Return the correspondence, the updated appearance and the masks, using appearance if it is known.

        Masks are (S, h, w) in the order of the first frame's slots.
        """
        if known is None:
            return correspondence, None, masks[correspondence.successors.to(masks.device)]
        weight, last = self._settings.appearance, correspondence.successors
        settled = known.step(frame.features[0], masks, frame.valid, last, weight, same=same)
        return replace(correspondence, successors=settled.successors), settled.known, settled.masks

    def _run_head(
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


def _slot_ids(num_slots: int) -> list[int]:
    """Return a unique ID for each slot, from 1."""
    if num_slots >= VOID:
        raise UserError(
            f"head.num_slots={num_slots} exceeds the mask ids 1 to {VOID - 1}. Use a model with fewer slots, or give "
            "the mask of the first frame, whose objects several slots may serve."
        )
    return list(range(1, num_slots + 1))


class Locked(NamedTuple):
    """Slots of a first frame under `lock_on`, background slots first."""

    allowed: Tensor  # (S, h, w) bool: cells that each slot may see
    serves: list[int]  # (S,) ID of each slot: 0 = background
    num_background: int  # number of background slots, without extra slots, which have ID 0 too


def lock(shares: Tensor, ids: Sequence[int], settings: SlotTracking, background: Tensor | None = None) -> Locked:
    """Return the cells that each slot sees: those of the background, or those of its object.

    A cell belongs to the ID that covers most of it; of equal IDs the first wins. An object that dominates no cell
    shares the cell that it covers most; an object without pixels gets no slot. No ID gets more slots than it has cells,
    but the background has at least one.

    Background slots see all cells labelled background. Extra slots see those of them that the class attention marks as
    foreground; without such cells there are no extra slots.

    Args:
        shares: fraction (1 + objects, h, w) of each cell that the background and the objects cover.
        ids: their IDs, 0 first.
        settings: numbers of slots.
        background: (h, w) bool, True where the class attention sees background; needed for extra slots.
    """
    cells = shares.argmax(0) == torch.arange(len(shares), device=shares.device)[:, None, None]  # (1 + objects, h, w)
    # the majority of no cell: without this, a thin object would be left out
    for cells_of_one, share in zip(cells, shares, strict=True):
        if share.any() and not cells_of_one.any():
            cells_of_one.view(-1)[share.argmax()] = True
    extra = torch.zeros_like(cells[0]) if background is None else cells[0] & ~background
    num_background = max(1, _at_most(settings.background_slots, cells[0]))
    # the order of the head's groups: background first
    groups = [(0, cells[0], num_background)]  # id, cells, slots
    groups += [
        (label, visible, _at_most(settings.slots_per_object, visible))
        for label, visible in zip(ids, cells, strict=True)
        if label
    ]
    groups += [(0, extra, _at_most(settings.extra_slots, extra))]
    allowed = torch.cat([visible.expand(count, -1, -1) for _, visible, count in groups])
    return Locked(allowed, [label for label, _, count in groups for _ in range(count)], num_background)


def hold(background: Tensor, sizes: Sequence[int], side: str) -> Tensor | None:
    """Return the cells that each slot may see (1, S, h, w), bool; None: all slots see all cells.

    Args:
        background: (h, w) bool, True where the class attention sees background.
        sizes: number of background slots, which come first, and of other slots.
        side: see `SlotTracking.hold`.
    """
    # DINOSAVi's evaluation restricts the background slots alone; groups are trained with both sides restricted
    others = {"background": torch.ones_like(background), "both": ~background}
    if side not in others:
        return None
    parts = zip((background, others[side]), sizes, strict=True)
    return torch.cat([cells.expand(size, -1, -1) for cells, size in parts])[None]


def _at_most(count: int, cells: Tensor) -> int:
    return min(count, int(cells.sum()))
