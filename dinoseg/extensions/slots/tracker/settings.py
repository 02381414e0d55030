"""Settings of slot tracking: binding of slots to objects, and matching between frames."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Natural, Positive, Range

_OF_APPEARANCE = ("appearance", "passes")  # fields that matter only with match=appearance


@dataclass(frozen=True)
class SlotTracking:
    """Settings for binding slots to objects and following them.

    Args:
        lock_on: restrict each slot of the first frame to the cells of its object, as labelled. False: slots are
            assigned to the objects that they overlap most.
        slots_per_object: slots per object with `lock_on`.
        background_slots: slots of the background with `lock_on`.
        extra_slots: with `lock_on`, slots for cells that the labels call background and the class attention foreground;
            0 for none.
        hold: which slots are restricted to their side of the class attention's background and foreground:
            `background` slots (as in DINOSAVi's evaluation), `both` (as groups are trained) or `none`. Applies in the
            frames that the head's groups name and, with `lock_on`, in all frames after the first.
        match: how slots are matched to the next frame. `overlap` and `soft_iou` compare masks, `similarity` (cosine)
            compares slot vectors, see `Correspondence`. `appearance` compares mean features of the cells won so far,
            see `Appearance`. `auto`: slots keep their order if the head propagates them, else `overlap`.
        temperature: temperature of `Correspondence`, for overlap, soft_iou and similarity.
        appearance: weight of appearance relative to a slot's mask, with that `match`; 0: masks alone assign cells.
        passes: number of passes over a video, with that `match`. With 2, the second pass knows each slot's appearance
            in the whole video from the first frame on. It takes twice as long and needs a video that can be read twice.

    Raises:
        UserError: two settings contradict one another.
    """

    # numbers of slots, what is held, and temperature as in DINOSAVi's evaluation
    lock_on: bool = False
    slots_per_object: Count = 1
    background_slots: Count = 5
    extra_slots: Natural = 0
    hold: Literal["background", "both", "none"] = "background"
    match: Literal["auto", "overlap", "soft_iou", "similarity", "appearance"] = "auto"
    temperature: Positive = 0.05
    appearance: Annotated[float, Range("a number from 0 to 1000000", 0, 1e6)] = 16.0
    passes: Annotated[int, Range("1 or 2", 1, 2)] = 1

    def __post_init__(self) -> None:
        if self.passes == 2 and self.match != "appearance":
            raise UserError(
                f"slots.passes=2 has no effect with slots.match={self.match}: the first pass collects slot appearance. "
                "Set slots.match=appearance, or slots.passes=1."
            )
        for key, value, least in (("slots_per_object", self.slots_per_object, 1), ("extra_slots", self.extra_slots, 0)):
            if not self.lock_on and value > least:
                raise UserError(
                    f"slots.{key}={value} has no effect with slots.lock_on=false. Set "
                    f"slots.lock_on=true, or leave it at {least}."
                )

    def effective(self) -> dict[str, Any]:
        """Return the settings that affect masks; those of appearance only with match=appearance."""
        values = asdict(self)
        return (
            values if self.match == "appearance" else {key: values[key] for key in values if key not in _OF_APPEARANCE}
        )
