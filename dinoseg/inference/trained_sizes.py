"""How large the pictures were that a model was trained on: larger ones show it things at a scale it never saw."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from dinoseg.core.sizes import Size, kept_longest
from dinoseg.models.model import Segmenter
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
KEY = "sizes"  # of a checkpoint's description
_FORM = forms.record(typical=forms.whole(1), largest=forms.whole(1))


@dataclass(frozen=True)
class TrainedSizes:
    """Longer sides of training images in pixels, as the model was fed them before crop and augmentation.

    Crops say nothing of scale: what is seen in them is as large as in the whole image.

    Args:
        typical: the median.
        largest: no picture of the training, enlarged as far as the augmentation does, or of its validation is larger,
            so that mode=predict never changes what mode=eval has scored.
    """

    typical: int
    largest: int

    @classmethod
    def of(
        cls, trained: Sequence[Size], scored: Sequence[Size], *, longest: int | None, enlarged: float
    ) -> "TrainedSizes":
        """Measure images (H, W), all reduced to `longest`; those that are trained on are enlarged by up to a factor."""
        sides, others = ([min(max(size), longest or max(size)) for size in sizes] for sizes in (trained, scored))
        return cls(round(median(sides)), max([round(max(sides) * max(1.0, enlarged)), *others]))

    def as_info(self) -> dict[str, Any]:
        """Return what a checkpoint says of it."""
        return {KEY: asdict(self)}

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> "TrainedSizes | None":
        """Read what a checkpoint says; None where it was not trained on images.

        Raises:
            UserError: it is no pair of sizes.
        """
        sizes = info.get(KEY)
        if sizes is None:
            return None
        try:
            _FORM(sizes, KEY)
        except forms.Misshapen as error:
            raise UserError(f"The checkpoint's description is damaged: {error}. Choose another one.") from None
        return cls(**sizes)


def keep_scale(
    model: Segmenter, sizes: TrainedSizes | None, *, reduces: bool = True, teacher: str | None = None
) -> None:
    """Let a segmenter take pictures larger than any of its training at the typical size, and say so once.

    Args:
        model: a segmenter; its `limit` is set.
        sizes: of its training; None: nothing is known, nothing done.
        reduces: else it only says so.
        teacher: the words that name it in a student's training.
    """
    if sizes is None:
        return
    longest = model.longest  # as the config says, for pictures of the training's scale
    told = False

    def limit(size: Size) -> int | None:
        nonlocal told
        kept = kept_longest(size, longest, sizes.typical, sizes.largest)
        if kept != longest and not told:
            told = True
            logger.warning("%s", _message(size, sizes, reduces, teacher))
        return kept if reduces else longest

    model.limit = limit


def _message(size: Size, sizes: TrainedSizes, reduces: bool, teacher: str | None) -> str:
    training = "the training" if teacher is None else f"the training of {teacher}"
    what = (
        f"Pictures of {size[1]} x {size[0]} (width x height) are larger than those of {training}, whose longer "
        f"sides were about {sizes.typical} pixels and enlarged at most {sizes.largest}. "
    )
    if teacher is not None:
        return (
            f"{what}It sees them reduced to a longer side of {sizes.typical}, as mode=predict shows them to it; the "
            "student sees them as resolution.longest says."
        )
    if not reduces:
        return (
            f"{what}They are scored as they are; mode=predict and mode=track reduce them to {sizes.typical}, unless "
            f"given resolution.longest=null. To score what these give, set resolution.longest={sizes.typical}."
        )
    return (
        f"{what}The model sees them reduced to a longer side of {sizes.typical}; masks keep the pictures' own size. "
        "Give resolution.longest for another size, or null for none, as mode=eval scores them."
    )
