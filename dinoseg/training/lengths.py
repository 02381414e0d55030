"""How long a training is, in optimizer steps: given so, or in epochs."""

from typing import NamedTuple

from dinoseg.errors import UserError


class Lengths(NamedTuple):
    """The lengths that `fit` takes."""

    steps: int
    val_every: int


def in_steps(
    samples: int,
    *,
    batch_size: int,
    accumulate: int,
    steps: int | None,
    epochs: float | None,
    val_every: int | None,
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
        UserError: there is no length, or one is out of range.
    """
    check(accumulate=accumulate, val_every=val_every, steps=steps if epochs is None else None)
    if epochs is not None and not 0 < epochs < float("inf"):
        raise UserError(f"trainer.epochs={epochs}: give a number above 0, such as 10, or null to use trainer.steps.")
    if epochs is None and steps is None:
        raise UserError("Neither trainer.steps nor trainer.epochs is set: give one of them.")
    epoch = samples / (batch_size * accumulate)
    return Lengths(
        steps=max(1, round(epochs * epoch)) if epochs is not None else steps or 0,
        val_every=max(1, round(epoch)) if val_every is None else val_every,
    )


def check(**lengths: int | None) -> None:
    """Refuse a length below 1.

    Raises:
        UserError: naming its key.
    """
    for name, length in lengths.items():
        if length is not None and length < 1:
            raise UserError(f"trainer.{name}={length}: give a number of at least 1.")
