"""Image sizes that a model was trained on, and the reduction of larger images to that scale."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from dinoseg.core.sizes import Size, reduced_longest
from dinoseg.models.model import SegmentationModel
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError

logger = logging.getLogger(__name__)
KEY = "sizes"  # key in a checkpoint's description
_FORM = forms.record(typical=forms.whole(1), largest=forms.whole(1))


@dataclass(frozen=True)
class TrainedSizes:
    """Longer sides of training images in pixels, at the model's input before crop and at factor 1 of the augmentation.

    Crops do not change the scale: objects are as large in a crop as in the whole image.

    Args:
        typical: the median.
        largest: the largest longer side among training images, at the augmentation's maximum scale, and validation
            images. Images up to this size are never reduced, so mode=predict and mode=eval see them at the same scale.
    """

    typical: int
    largest: int

    @classmethod
    def of(
        cls, trained: Sequence[Size], scored: Sequence[Size], *, longest: int | None, enlarged: float
    ) -> "TrainedSizes":
        """Measure images (H, W) reduced to `longest`; `enlarged` is the maximum scale factor of the augmentation."""
        sides, others = ([min(max(size), longest or max(size)) for size in sizes] for sizes in (trained, scored))
        return cls(round(median(sides)), max([round(max(sides) * max(1.0, enlarged)), *others]))

    def as_info(self) -> dict[str, Any]:
        """Return the entry of a checkpoint's description."""
        return {KEY: asdict(self)}

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> "TrainedSizes | None":
        """Read the sizes from a checkpoint's description; None if the model was not trained on images.

        Raises:
            UserError: the entry is not a valid pair of sizes.
        """
        sizes = info.get(KEY)
        if sizes is None:
            return None
        try:
            _FORM(sizes, KEY)
        except forms.SchemaError as error:
            raise UserError(f"The checkpoint's description is damaged: {error}. Choose another one.") from None
        return cls(**sizes)


def limit_to_trained_size(
    model: SegmentationModel, sizes: TrainedSizes | None, *, reduces: bool = True, teacher: str | None = None
) -> None:
    """Make a segmenter reduce images larger than any in training to the typical size, and log this once.

    Args:
        model: a segmenter; its `limit` is set.
        sizes: image sizes of its training; None: unknown, which makes this a no-op.
        reduces: whether to reduce such images; False: only log a warning.
        teacher: name of the model in messages if it is the teacher of a student; None: it is not.
    """
    if sizes is not None:
        model.limit = ScaleLimit(sizes, model.longest, reduces, teacher)


@dataclass
class ScaleLimit:
    """Limit on the longer side of images of a size, for `SegmentationModel.limit`; see `limit_to_trained_size`.

    Attributes:
        sizes: image sizes of the training.
        longest: the configured limit in pixels, for images at training scale; None: none.
        reduces: as of `limit_to_trained_size`.
        teacher: as of `limit_to_trained_size`.
    """

    sizes: TrainedSizes
    longest: int | None
    reduces: bool
    teacher: str | None
    _warned: bool = field(default=False, init=False)

    def __call__(self, size: Size) -> int | None:
        """Return the limit in pixels for images of `size` (H, W), and warn once if it is lower than configured."""
        limited = reduced_longest(size, self.longest, self.sizes.typical, self.sizes.largest)
        if limited != self.longest and not self._warned:
            self._warned = True
            logger.warning("%s", _message(size, self.sizes, self.reduces, self.teacher))
        return limited if self.reduces else self.longest


def _message(size: Size, sizes: TrainedSizes, reduces: bool, teacher: str | None) -> str:
    training = "the training" if teacher is None else f"the training of {teacher}"
    what = (
        f"Images of {size[1]} x {size[0]} (width x height) are larger than those of {training}, whose longer sides "
        f"were about {sizes.typical} pixels, enlarged at most to {sizes.largest}. "
    )
    if teacher is not None:
        return (
            f"{what}The teacher gets them reduced to a longer side of {sizes.typical}, as in mode=predict; the student "
            "gets them at resolution.longest."
        )
    if not reduces:
        return (
            f"{what}They are scored at full size; mode=predict and mode=track reduce them to {sizes.typical}, unless "
            f"resolution.longest=null. To score at that size, set resolution.longest={sizes.typical}."
        )
    return (
        f"{what}The model gets them reduced to a longer side of {sizes.typical}; masks have the full image size. Set "
        "resolution.longest to another size, or to null for full size, as in mode=eval."
    )
