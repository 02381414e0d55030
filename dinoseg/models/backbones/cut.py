"""A transformer's blocks in two parts: what those before a cut give, and how the others go on from it."""

from collections.abc import Callable, Collection, Sequence

from torch import Tensor

from dinoseg.core.contracts import BesideTokens

Block = Callable[..., Tensor]


def until(
    blocks: Sequence[Block], cut: int, tapped: Collection[int], tokens: Tensor, prefix: int, beside: BesideTokens
) -> list[Tensor]:
    """Return the patch tokens (B, h * w, C) of tapped blocks before number `cut`, and the tokens that enter that one.

    Args:
        blocks: in order.
        cut: a number of theirs, or how many there are: then no tokens enter one.
        tapped: numbers of the blocks that are read.
        tokens: (B, prefix + h * w, C), which enter the first block.
        prefix: class and register tokens, which come first.
        beside: what each block takes beside the tokens.
    """
    given = []
    for number, block in enumerate(blocks[:cut]):
        tokens = block(tokens, **beside)
        if number in tapped:
            given.append(tokens[:, prefix:].contiguous())
    return given if cut == len(blocks) else [*given, tokens]


def onwards(
    blocks: Sequence[Block],
    cut: int,
    tapped: Collection[int],
    frozen: Sequence[Tensor],
    prefix: int,
    beside: Callable[[], BesideTokens],
) -> dict[int, Tensor]:
    """Return the patch tokens (B, h * w, C) of each tapped block, from what `until` gave.

    `beside` is asked for only if there are blocks to go through.
    """
    patches = dict(zip(sorted(tapped), frozen, strict=False))  # of those before the cut, and of no more
    if cut == len(blocks):
        return patches
    tokens, with_tokens = frozen[-1], beside()
    for number, block in enumerate(blocks[cut:], start=cut):
        tokens = block(tokens, **with_tokens)
        if number in tapped:
            patches[number] = tokens[:, prefix:]
    return patches
