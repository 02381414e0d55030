"""What a trained model is, beside its weights: its classes, sizes, scores and sources, as plain values; no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dinoseg.data.classes.labels import Labels
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError

UNKNOWN = "unknown"
_COLOURS = forms.listing(forms.listing(forms.whole(0, 255), 3))
_LABELS = forms.holding(classes=forms.listing(forms.text), palette=_COLOURS, ignore_index=forms.whole(0, 255))
_SOURCE = forms.holding(
    **dict.fromkeys(("name", "hash", "licence"), forms.text),
    **dict.fromkeys(("weights", "revision"), forms.maybe(forms.text)),
    gated=forms.flag,
)
_PART: Mapping[str, forms.Form] = {  # key under `facts` to the form of its value
    "normalisation": forms.table(forms.listing(forms.number(-1e6, 1e6), 3)),
    "sizes": forms.table(forms.plain),
    "scores": forms.maybe(forms.table(forms.plain)),
    "backbone": lambda value, where: None if value == {} else _SOURCE(value, where),
    "data": forms.table(forms.plain),
    "versions": forms.table(forms.text),
    "choices": forms.table(forms.text),
    "delta": forms.flag,
}


@dataclass(frozen=True)
class Facts:
    """What a trained model says of itself.

    Attributes:
        classes: a name for each id.
        palette: (red, green, blue) for each class, 0..255.
        ignore_index: what ids that are not scored have in masks of its data.
        normalisation: `mean` and `std` of its backbone's colours, RGB in 0..1; images are normalised inside.
        sizes: `scale`, `longest`, `crop` of the training's resolution, `typical` and `largest` of its images, and how
            images are predicted (`inference`).
        scores: with their protocol and where they come from; None where no evaluation was found.
        backbone: `name`, `weights`, `revision`, `hash`, `licence`, `gated`.
        data: a fingerprint of the training data.
        versions: of dinoseg and the libraries that it was written with.
        choices: option of each config group.
        delta: whether the file holds what was trained alone.
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int
    normalisation: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] | None = None
    backbone: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    delta: bool = False

    def part(self) -> dict[str, Any]:
        """Return all but the classes as plain values, as a file's description holds it under `facts`."""
        return {key: value for key, value in asdict(self).items() if key in _PART}

    def description(self) -> dict[str, Any]:
        """Return all as plain values, from which `of` makes it again."""
        colours = [list(colour) for colour in self.palette]
        labels = {"classes": list(self.classes), "palette": colours, "ignore_index": self.ignore_index}
        return {**labels, "facts": self.part()}

    @classmethod
    def of(cls, description: Mapping[str, Any], where: str) -> "Facts":
        """Return what a description says, which may come from anybody; one without `facts` tells of its classes alone.

        What a newer dinoseg says beside is passed over.

        Raises:
            UserError: something in it is not what dinoseg writes; `where` begins the message.
        """
        try:
            _LABELS(dict(description), "its description")
            labels = Labels.of(*(description[key] for key in ("classes", "palette", "ignore_index")))
            part = description.get("facts", {})
            forms.holding()(part, "facts")
            known = {key: part[key] for key in _PART if key in part}
            for key, value in known.items():
                _PART[key](value, f"facts.{key}")
        except (forms.Misshapen, UserError) as error:
            reason = str(error).removesuffix(".")
            raise UserError(f"{where}: {reason}. Choose another file, or export the model again.") from None
        return cls(labels.classes, labels.palette, labels.ignore_index, **known)
