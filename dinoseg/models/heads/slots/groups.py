"""Slots in two groups, of the background and of the foreground, each of which sees its own cells only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dinoseg.utils.errors import UserError

GROUPS = ("off", "initial", "always")


def slot_sizes(num_slots: int | Sequence[int], groups: str) -> list[int]:
    """Return the number of slots in each group, all in one without groups."""
    sizes = [num_slots] if isinstance(num_slots, int) else list(num_slots)
    shown = str(sizes).replace(" ", "") if not isinstance(num_slots, int) else num_slots
    if min(sizes, default=0) < 1:
        raise UserError(f"head.num_slots={shown}: give at least 1 slot, with head.groups two such numbers.")
    if groups == "off" and not isinstance(num_slots, int):
        raise UserError(
            f"head.num_slots={shown} with head.groups=off: without groups give one number, such as "
            f"head.num_slots={sum(sizes)}, or set head.groups=initial or always."
        )
    if groups != "off" and len(sizes) != 2:
        raise UserError(
            f"head.num_slots={shown} with head.groups={groups}: give the numbers of background and of foreground "
            f"slots, such as head.num_slots=[5,5]."
        )
    return sizes


def allowed_cells(background: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return which cells each slot may see (B, S, h, w), bool, True = may.

    Args:
        background: where it is (B, h, w), bool.
        sizes: slots of the background and of the foreground, which come in this order.
    """
    cells = background[:, None]
    num_background, num_foreground = sizes
    return torch.cat([cells.expand(-1, num_background, -1, -1), ~cells.expand(-1, num_foreground, -1, -1)], dim=1)
