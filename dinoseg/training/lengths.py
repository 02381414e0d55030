"""Length of a training in optimizer steps, from a number of steps or epochs."""

from typing import NamedTuple

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Positive


class Lengths(NamedTuple):
    """Lengths that `fit` takes."""

    steps: int
    val_every: int


def in_steps(
    samples: int,
    *,
    batch_size: Count,
    accumulate: Count,
    steps: Count | None,
    epochs: Positive | None,
    val_every: Count | None,
) -> Lengths:
    """Return a training's lengths in optimizer steps.

    Epochs follow one another without a gap: an epoch of 10 samples in batches of 4 is two and a half steps long. Only
    the total is rounded.

    Args:
        samples: in an epoch.
        batch_size: samples in a batch, over all devices.
        accumulate: batches per optimizer step.
        steps: the length if `epochs` is None.
        epochs: the length, which takes precedence over `steps`.
        val_every: steps between validations; None: an epoch.

    Raises:
        UserError: neither `steps` nor `epochs` is set.
    """
    if epochs is None and steps is None:
        raise UserError("Neither trainer.steps nor trainer.epochs is set: give one of them.")
    epoch = samples / (batch_size * accumulate)
    return Lengths(
        steps=max(1, round(epochs * epoch)) if epochs is not None else steps or 0,
        val_every=max(1, round(epoch)) if val_every is None else val_every,
    )
