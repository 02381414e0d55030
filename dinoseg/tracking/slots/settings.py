"""How slots are bound to a video's objects, and followed from frame to frame."""

from dataclasses import dataclass

from dinoseg.errors import UserError
from dinoseg.ranges import Count, Natural, Positive

MATCHES = ("auto", "overlap", "soft_iou", "similarity", "appearance")
HOLDS = ("background", "both", "none")


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
        for key, value, least in (("slots_per_object", self.slots_per_object, 1), ("extra_slots", self.extra_slots, 0)):
            if not self.lock_on and value > least:
                raise UserError(
                    f"slots.{key}={value} has no effect with slots.lock_on=false. Set "
                    f"slots.lock_on=true, or leave it at {least}."
                )
