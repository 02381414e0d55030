"""Slots shown only the cells of what they shall follow: the first frame's labels decide, and the class attention."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dinoseg.tracking.slots.settings import SlotTracking


class Locked(NamedTuple):
    """The slots of a first frame, those of the background first."""

    allowed: Tensor  # (S, h, w) bool: which cells each slot may see
    serves: list[int]  # (S,) the id of each: 0 = background
    num_background: int  # slots without the extra ones, which serve it too


def lock(shares: Tensor, ids: Sequence[int], settings: SlotTracking, background: Tensor | None = None) -> Locked:
    """Return which cells each slot sees: those of the background, or of its object.

    A cell is of what covers most of it, the earlier of equals. An object that covers most of no cell has the cell of
    which it covers most, together with what is there; one without a pixel has no slot. None gets more slots than it has
    cells, but the background has one in any case.

    Background slots see all that the labels call background; extra slots of that what the class attention does not, and
    where there is no such cell there are none.

    Args:
        shares: of each cell (1 + objects, h, w) that the background and the objects cover.
        ids: of these, 0 first.
        settings: how many slots there are to be.
        background: (h, w) bool, True where the class attention sees background; needed for extra slots.
    """
    cells = shares.argmax(0) == torch.arange(len(shares), device=shares.device)[:, None, None]  # (1 + objects, h, w)
    for cells_of_one, share in zip(cells, shares, strict=True):
        if share.any() and not cells_of_one.any():
            cells_of_one.view(-1)[share.argmax()] = True
    extra = torch.zeros_like(cells[0]) if background is None else cells[0] & ~background
    num_background = max(1, _at_most(settings.background_slots, cells[0]))
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
    """Return which cells each slot may see (1, S, h, w), bool; None: all see all.

    Args:
        background: (h, w) bool, True where the class attention sees background.
        sizes: numbers of background slots, which come first, and of the others.
        side: see `SlotTracking.hold`.
    """
    others = {"background": torch.ones_like(background), "both": ~background}
    if side not in others:
        return None
    parts = zip((background, others[side]), sizes, strict=True)
    return torch.cat([cells.expand(size, -1, -1) for cells, size in parts])[None]


def _at_most(count: int, cells: Tensor) -> int:
    return min(count, int(cells.sum()))
