"""How much of a training fits into a time, by what was measured of its parts."""

from collections.abc import Sequence
from dataclasses import dataclass

from dinoseg.choosing.facts import Facts
from dinoseg.choosing.rules import LEAST_GAIN, LEAST_USES, MOST_VALIDATIONS, VALIDATING, VIEWS
from dinoseg.choosing.timing import Seconds

SURE = 0.95  # of the time: what else runs on the machine comes and goes
FLOOR = 0.03  # of a training's time: mode=train's own share to hold it against its closed form
_SCORING = 2.0  # validations: the scoring at the end draws pictures and a report beside


@dataclass(frozen=True)
class Length:
    """What of a training fits into a time.

    Attributes:
        images: that are trained on, counted each time; below 1 where not even a validation fits.
        views: of each image, whose features are kept; None: new ones in each epoch.
        validations: beside the scoring at the end.
        spent: seconds that pass beside the steps and the closed form.
    """

    images: int
    views: int | None
    validations: int
    spent: float


def length_within(
    seconds: float, timed: Seconds, facts: Facts, *, views: Sequence[int | None] = (None, *VIEWS)
) -> Length:
    """Return the training that fits into so many seconds.

    Args:
        seconds: from now on, until all is scored.
        timed: what its parts take.
        facts: of the data.
        views: that may be chosen; None among them: new ones in each epoch.
    """
    validation = facts.val_images * timed.val
    validations = max(1, min(MOST_VALIDATIONS, int(VALIDATING * seconds / max(validation, 1e-9))))
    spent = timed.start + (validations + _SCORING) * validation
    left = (SURE * seconds - spent) / (1 + FLOOR)
    live = Length(int(left / timed.image), None, validations, spent)
    kept = [each for count in views if count is not None and (each := _kept(left, timed, facts, count, live))]
    if None not in views:
        return kept[0] if kept else live
    paying = [each for each in kept if each.images >= LEAST_GAIN * live.images and _is_used(each, facts)]
    return paying[0] if paying else live


def _kept(left: float, timed: Seconds, facts: Facts, views: int, live: Length) -> Length | None:
    """Return the length where features of so many views are kept, each computed when it first comes."""
    if timed.kept is None:
        return None
    distinct = views * facts.images
    images = left / (timed.kept + timed.frozen)
    if images > distinct:
        images = (left - distinct * timed.frozen) / timed.kept
    return Length(int(images), views, live.validations, live.spent)


def _is_used(length: Length, facts: Facts) -> bool:
    return length.views is not None and length.images >= LEAST_USES * length.views * facts.images
