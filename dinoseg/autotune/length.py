"""How much of a training fits into a time, by what was measured of its parts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dinoseg.autotune.facts import Facts
from dinoseg.autotune.rules import LEAST_GAIN, LEAST_USES, MOST_VALIDATIONS, SCORING, VALIDATING, VIEWS
from dinoseg.autotune.timing import Seconds

SURE = 0.95  # of the time: what else runs on the machine comes and goes
FLOOR = 0.03  # of a training's time: mode=train's own share to hold it against its closed form
_SCORED = 2.0  # validations: the scoring at the end draws pictures and a report beside


@dataclass(frozen=True)
class Length:
    """What of a training fits into a time.

    Attributes:
        images: that are trained on, counted each time; 0 where there is no time for any.
        views: of each image, whose features are kept; None: new ones in each epoch.
        val_images: that each validation and the scoring see; None: all.
        validations: beside the scoring at the end.
        spent: seconds that pass beside the steps and the closed form.
        limit: seconds, for the steps and the validations between them.
    """

    images: int
    views: int | None
    val_images: int | None
    validations: int
    spent: float
    limit: float


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
    most = max(1, int(SCORING * seconds / max((1 + _SCORED) * timed.val, 1e-9)))
    val_images = None if most >= facts.val_images else most
    validation = (val_images or facts.val_images) * timed.val
    validations = max(1, min(MOST_VALIDATIONS, int(VALIDATING * seconds / max(validation, 1e-9))))
    beside = timed.start + _SCORED * validation
    spent = beside + validations * validation
    # a training knows how long a validation takes once there was one
    limit = max(1.0, (seconds - beside) / (1 + FLOOR) - (validation if validations == 1 else 0))
    left = (SURE * seconds - spent) / (1 + FLOOR)
    live = Length(max(0, int(left / timed.image)), None, val_images, validations, spent, limit)
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
    return replace(live, images=max(0, int(images)), views=views)


def _is_used(length: Length, facts: Facts) -> bool:
    return length.views is not None and length.images >= LEAST_USES * length.views * facts.images
