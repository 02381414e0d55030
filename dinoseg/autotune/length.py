"""Length of a training that fits into a time budget, from measured times."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dinoseg.autotune.facts import DatasetFacts
from dinoseg.autotune.rules import MAX_VALIDATIONS, MIN_GAIN, MIN_USES, SCORING, VALIDATING, VIEWS
from dinoseg.autotune.timing import RecipeTimes

SURE = 0.95  # share of the time to plan with, since the load of the machine varies
PROBING = 0.03  # share of the training's time that mode=train spends on the comparison with the linear probe
_SCORED = 2.0  # cost of the final evaluation in validations; it also draws figures and a report


@dataclass(frozen=True)
class Length:
    """Length of a training within a time budget.

    Attributes:
        images: training images, with repetition; 0 if there is no time for any.
        views: fixed views of each image whose features are cached; None: new views in each epoch.
        val_images: images of each validation and of the final evaluation; None: all.
        validations: besides the final evaluation.
        spent: seconds besides the steps and the linear probe.
        limit: seconds for the steps and the validations between them.
    """

    images: int
    views: int | None
    val_images: int | None
    validations: int
    spent: float
    limit: float


def length_within(
    seconds: float, timed: RecipeTimes, facts: DatasetFacts, *, views: Sequence[int | None] = (None, *VIEWS)
) -> Length:
    """Return the training that fits into a number of seconds.

    Args:
        seconds: from now until the final evaluation has ended.
        timed: measured times.
        facts: of the data.
        views: allowed numbers of cached views; None among them allows new views in each epoch.
    """
    most = max(1, int(SCORING * seconds / max((1 + _SCORED) * timed.val, 1e-9)))
    val_images = None if most >= facts.val_images else most
    validation = (val_images or facts.val_images) * timed.val
    validations = max(1, min(MAX_VALIDATIONS, int(VALIDATING * seconds / max(validation, 1e-9))))
    overhead = timed.start + _SCORED * validation
    spent = overhead + validations * validation
    # the trainer knows the duration of a validation only after the first one
    limit = max(1.0, (seconds - overhead) / (1 + PROBING) - (validation if validations == 1 else 0))
    left = (SURE * seconds - spent) / (1 + PROBING)
    live = Length(max(0, int(left / timed.image)), None, val_images, validations, spent, limit)
    lengths = [
        each for count in views if count is not None and (each := _cached_length(left, timed, facts, count, live))
    ]
    if None not in views:
        return lengths[0] if lengths else live
    paying = [each for each in lengths if each.images >= MIN_GAIN * live.images and _is_used(each, facts)]
    return paying[0] if paying else live


def _cached_length(left: float, timed: RecipeTimes, facts: DatasetFacts, views: int, live: Length) -> Length | None:
    """Return the length with features cached at first use, of `views` views; None if the model cannot be cut."""
    if timed.cached is None:
        return None
    distinct = views * facts.images
    images = left / (timed.cached + timed.frozen)
    if images > distinct:
        images = (left - distinct * timed.frozen) / timed.cached
    return replace(live, images=max(0, int(images)), views=views)


def _is_used(length: Length, facts: DatasetFacts) -> bool:
    return length.views is not None and length.images >= MIN_USES * length.views * facts.images
