"""How long a training is, in optimizer steps: given so, or in epochs."""

from typing import NamedTuple

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Positive


class Lengths(NamedTuple):
    """The lengths that `fit` takes."""

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

    Epochs follow one another without a gap, so one of 10 samples in batches of 4 is two and a half steps long; what
    comes of that is rounded once.

    Args:
        samples: in an epoch.
        batch_size: samples in a batch, over all devices.
        accumulate: batches per optimizer step.
        steps: the length where `epochs` is None.
        epochs: the length, whatever `steps` says.
        val_every: steps between validations; None: an epoch.

    Raises:
        UserError: there is no length.
    """
    if epochs is None and steps is None:
        raise UserError("Neither trainer.steps nor trainer.epochs is set: give one of them.")
    epoch = samples / (batch_size * accumulate)
    return Lengths(
        steps=max(1, round(epochs * epoch)) if epochs is not None else steps or 0,
        val_every=max(1, round(epoch)) if val_every is None else val_every,
    )
