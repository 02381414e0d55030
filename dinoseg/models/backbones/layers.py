"""Resolution of `layers` to block indices."""

import math
from collections.abc import Sequence

from dinoseg.utils.errors import UserError

QUARTERS = "quarters"
_META = {
    24: [4, 11, 17, 23]
}  # Meta's choice for ViT-L in DINOv2 and DINOv3; the first is one block earlier than in an even spread


def resolve_layers(layers: Sequence[int] | str, depth: int) -> list[int]:
    """Return the 0-based block indices that `layers` denotes in a backbone of `depth` blocks (or stages).

    Args:
        layers: block numbers (negative ones count from the last), or the word `quarters`: four blocks, each the last
            of a quarter of the depth (4, 11, 17 and 23 of 24 blocks, as Meta chose them).
        depth: number of blocks.

    Raises:
        UserError: unknown word, empty list, number that is not an integer or out of range, or fewer than four blocks
            for `quarters`.
    """
    if isinstance(layers, str):
        if layers != QUARTERS:
            raise UserError(f"layers={layers}: give a list of block numbers, such as [-1], or {QUARTERS}.")
        if depth < 4:
            raise UserError(
                f"layers={QUARTERS} needs four blocks, and this backbone has {depth}. Choose a head that "
                "reads any number, such as linear or cnn, with layers=[-1]."
            )
        return list(_META.get(depth, [math.ceil(part * depth / 4) - 1 for part in (1, 2, 3, 4)]))
    if any(isinstance(layer, bool) or not isinstance(layer, int) for layer in layers):
        raise UserError(f"layers={list(layers)}: block numbers are integers. Give a list such as [-1] or [2, 5].")
    wrong = [layer for layer in layers if not -depth <= layer < depth]
    if wrong or not layers:
        raise UserError(
            f"layers={list(layers)}: this backbone has {depth} blocks; give at least one number, "
            f"each from {-depth} to {depth - 1} (negative counts from the last)."
        )
    return [layer % depth for layer in layers]
