"""Blocks of a backbone that `layers` denotes."""

import math
from collections.abc import Sequence
from typing import Literal

from dinoseg.utils.errors import UserError

Layers = Sequence[int] | Literal["quarters"]
_META = {
    24: [4, 11, 17, 23]
}  # Meta's choice for ViT-L in DINOv2 and DINOv3; the first is one block earlier than in an even spread


def resolve_layers(layers: Layers, depth: int) -> list[int]:
    """Return the 0-based block indices that `layers` denotes in a backbone of `depth` blocks (or stages).

    Args:
        layers: block numbers (negative ones count from the last), or the word `quarters`: four blocks, each the last
            of a quarter of the depth (4, 11, 17 and 23 of 24 blocks, as Meta chose them).
        depth: number of blocks.

    Raises:
        UserError: empty list, number out of range, or fewer than four blocks for `quarters`.
    """
    if layers == "quarters":
        if depth < 4:
            raise UserError(
                f"layers=quarters needs four blocks, and this backbone has {depth}. Choose a head that "
                "reads any number, such as linear or cnn, with layers=[-1]."
            )
        return list(_META.get(depth, [math.ceil(part * depth / 4) - 1 for part in (1, 2, 3, 4)]))
    wrong = [layer for layer in layers if not -depth <= layer < depth]
    if wrong or not layers:
        raise UserError(
            f"layers={list(layers)}: this backbone has {depth} blocks; give at least one number, "
            f"each from {-depth} to {depth - 1} (negative counts from the last)."
        )
    return [layer % depth for layer in layers]
