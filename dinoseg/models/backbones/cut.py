"""Blocks of a transformer, run in one go or split at a block."""

from collections.abc import Callable, Collection, Iterable, Sequence

from torch import Tensor

from dinoseg.core.contracts import BlockKwargs

Block = Callable[..., Tensor]


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
