"""Split forward pass of a transformer: the blocks before a cut, and those after it."""

from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from dinoseg.core.contracts import BlockKwargs

Block = Callable[..., Tensor]


def forward_frozen(
    blocks: Sequence[Block], cut: int, tapped: Collection[int], tokens: Tensor, prefix: int, block_kwargs: BlockKwargs
) -> list[Tensor]:
    """Return the patch tokens (B, h * w, C) of tapped blocks before block `cut`, and the input tokens of block `cut`.

    Args:
        blocks: in order.
        cut: index of a block, or the number of blocks (then no input tokens are returned).
        tapped: indices of the blocks whose output is returned.
        tokens: input of the first block, (B, prefix + h * w, C).
        prefix: number of class and register tokens, which come first.
        block_kwargs: keyword arguments of each block.
    """
    given = []
    for number, block in enumerate(blocks[:cut]):
        tokens = block(tokens, **block_kwargs)
        if number in tapped:
            given.append(tokens[:, prefix:].contiguous())
    return given if cut == len(blocks) else [*given, tokens]


def forward_trainable(
    blocks: Sequence[Block],
    cut: int,
    tapped: Collection[int],
    frozen: Sequence[Tensor],
    prefix: int,
    block_kwargs: Callable[[], BlockKwargs],
) -> dict[int, Tensor]:
    """Return the patch tokens (B, h * w, C) of each tapped block, given the output of `forward_frozen`.

    `block_kwargs` is called only if there are blocks left to run.
    """
    patches = dict(zip(sorted(tapped), frozen, strict=False))  # stops at the tapped blocks before the cut
    if cut == len(blocks):
        return patches
    tokens, with_tokens = frozen[-1], block_kwargs()
    for number, block in enumerate(blocks[cut:], start=cut):
        tokens = block(tokens, **with_tokens)
        if number in tapped:
            patches[number] = tokens[:, prefix:]
    return patches
