"""Blocks of a backbone: which of them `layers` denotes, and transformer blocks run in one go or split at a block."""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal

from torch import Tensor

from dinoseg.core.contracts import BlockKwargs
from dinoseg.utils.errors import UserError

Block = Callable[..., Tensor]
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


def run_blocks(
    blocks: Iterable[Block],
    tapped: Collection[int],
    tokens: Tensor,
    prefix: int,
    block_kwargs: BlockKwargs,
    first: int = 0,
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the tokens after the last block, and the patch tokens (B, h * w, C) after each tapped block.

    Args:
        blocks: in order.
        tapped: indices of blocks.
        tokens: input of the first block, (B, prefix + h * w, C).
        prefix: number of class and register tokens, which come first.
        block_kwargs: keyword arguments of each block.
        first: index of the first block.
    """
    patches = {}
    for number, block in enumerate(blocks, start=first):
        tokens = block(tokens, **block_kwargs)
        if number in tapped:
            patches[number] = tokens[:, prefix:].contiguous()
    return tokens, patches


def run_frozen_blocks(
    blocks: Sequence[Block], cut: int, tapped: Collection[int], tokens: Tensor, prefix: int, block_kwargs: BlockKwargs
) -> list[Tensor]:
    """Return the patch tokens of tapped blocks before block `cut`, and the input tokens of block `cut`, if any."""
    tokens, patches = run_blocks(blocks[:cut], tapped, tokens, prefix, block_kwargs)
    return [*patches.values()] if cut == len(blocks) else [*patches.values(), tokens]


def run_trained_blocks(
    blocks: Sequence[Block],
    cut: int,
    tapped: Collection[int],
    frozen: Sequence[Tensor],
    prefix: int,
    block_kwargs: BlockKwargs,
) -> dict[int, Tensor]:
    """Return the patch tokens of each tapped block, given the output of `run_frozen_blocks`."""
    patches = dict(zip(sorted({*tapped}), frozen, strict=False))  # stops at the tapped blocks before the cut
    return patches | run_blocks(blocks[cut:], tapped, frozen[-1], prefix, block_kwargs, cut)[1]
