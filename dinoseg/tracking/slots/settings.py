"""How slots are bound to a video's objects, and followed from frame to frame."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Natural, Positive, Range

MATCHES = ("auto", "overlap", "soft_iou", "similarity", "appearance")
HOLDS = ("background", "both", "none")
_OF_LOOKS = ("appearance", "looks")  # that nothing depends on unless slots are known by what they look like


@dataclass(frozen=True)
class SlotTracking:
    """How slots are bound to objects, and followed.

    Args:
        lock_on: show each slot of the first frame only what it shall follow, as the labels say; otherwise the slots
            that the model finds are given to what they overlap most.
        slots_per_object: that an object has with `lock_on`.
        background_slots: that the background has with `lock_on`.
        extra_slots: with `lock_on`, for what the labels call background and the class attention does not; 0 for none.
        hold: which slots see only their side of what the class attention calls background and foreground, in the frames
            in which the head's groups say so and, with `lock_on`, in all after the first: those of the `background`
            (as DINOSAVi does when it evaluates), `both` (as groups are trained) or `none`.
        match: how slots are followed to the next frame: by the `overlap` or the `soft_iou` of their masks or the
            `similarity` (cosine) of their vectors, see `Correspondence`; by the `appearance` of what they have won in
            all frames so far, see `Appearance`; `auto`: they keep their places where the head carries them over, and
            otherwise by overlap.
        temperature: of the steps of a `Correspondence`, by overlap, soft_iou and similarity.
        appearance: what looks count beside a slot's own mask, with that `match`; 0: masks alone say whose a cell is.
        looks: times that a video is looked at, with that `match`: at the second one it is known from the first frame on
            what each slot looks like in all of them. It takes twice as long, and a video that can be read twice.

    Raises:
        UserError: for a value out of range or an unknown word.
    """

    lock_on: bool = False
    slots_per_object: Count = 1
    background_slots: Natural = 5
    extra_slots: Natural = 0
    hold: str = "background"
    match: str = "auto"
    temperature: Positive = 0.05
    appearance: Annotated[float, Range("a number from 0 to 1000000", 0, 1e6)] = 16.0
    looks: Annotated[int, Range("1 or 2", 1, 2)] = 1

    def __post_init__(self) -> None:
        for key, value, least in (
            ("slots_per_object", self.slots_per_object, 1),
            ("background_slots", self.background_slots, 1),
            ("extra_slots", self.extra_slots, 0),
        ):
            if value < least or value != int(value):
                raise UserError(f"slots.{key}={value} must be a whole number, {least} or more.")
        for key, word, words in (("hold", self.hold, HOLDS), ("match", self.match, MATCHES)):
            if word not in words:
                raise UserError(f"slots.{key}={word} is unknown. Choose one of: {', '.join(words)}.")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"slots.temperature={self.temperature} must be above 0 and finite, such as 0.05.")
        if not 0 <= self.appearance <= 1e6:
            raise UserError(f"slots.appearance={self.appearance}: give a number from 0 to 1000000, such as 16.")
        if self.looks not in (1, 2):
            raise UserError(f"slots.looks={self.looks}: a video is looked at once or twice. Give 1 or 2.")
        if self.looks == 2 and self.match != "appearance":
            raise UserError(
                f"slots.looks=2 has no effect with slots.match={self.match}: the first look is for what slots look "
                "like. Set slots.match=appearance, or slots.looks=1."
            )
        for key, value, least in (("slots_per_object", self.slots_per_object, 1), ("extra_slots", self.extra_slots, 0)):
            if not self.lock_on and value > least:
                raise UserError(
                    f"slots.{key}={value} has no effect with slots.lock_on=false. Set "
                    f"slots.lock_on=true, or leave it at {least}."
                )

    def told(self) -> dict[str, Any]:
        """Return what masks depend on."""
        values = asdict(self)
        return values if self.match == "appearance" else {key: values[key] for key in values if key not in _OF_LOOKS}
