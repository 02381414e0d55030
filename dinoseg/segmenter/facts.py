"""Metadata of a trained model: classes, sizes, scores and sources as plain values; imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dinoseg.core.channels import PixelFormat
from dinoseg.data.classes.labels import Labels
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError

UNKNOWN = "unknown"
_COLOURS = forms.list_of(forms.list_of(forms.whole(0, 255), 3))
_LABELS = forms.object_with(classes=forms.list_of(forms.text), palette=_COLOURS, ignore_index=forms.whole(0, 255))
_SOURCE = forms.object_with(
    **dict.fromkeys(("name", "hash", "licence"), forms.text),
    **dict.fromkeys(("weights", "revision"), forms.maybe(forms.text)),
    gated=forms.flag,
)
_PIXELS = forms.record(
    channels=forms.whole(1, 1024),
    files=forms.list_of(forms.text),
    order=forms.maybe(forms.list_of(forms.whole())),
    value_range=forms.maybe(forms.list_of(forms.number(), 2)),
)
_PART: Mapping[str, forms.Form] = {  # key under `facts` to the form of its value
    "normalisation": forms.table(forms.list_of(forms.number(-1e6, 1e6))),
    "pixels": lambda value, where: None if value == {} else _PIXELS(value, where),
    "sizes": forms.table(forms.plain),
    "scores": forms.maybe(forms.table(forms.plain)),
    "backbone": lambda value, where: None if value == {} else _SOURCE(value, where),
    "data": forms.table(forms.plain),
    "versions": forms.table(forms.text),
    "choices": forms.table(forms.text),
    "delta": forms.flag,
    "dequantised": forms.maybe(forms.whole(1, 16)),
}


@dataclass(frozen=True)
class ModelFacts:
    """Metadata of a trained model.

    Attributes:
        classes: a name for each id.
        palette: (red, green, blue) for each class, 0..255.
        ignore_index: id of unscored pixels in the masks of its data.
        normalisation: `mean` and `std` of each channel of its backbone's input, in 0..1; the model normalises images.
        pixels: values of `PixelFormat` for files that are no RGB images of 8 bits; empty for these.
        sizes: `scale`, `longest`, `crop` of the training's resolution, `typical` and `largest` of its images, and the
            inference strategy (`inference`).
        scores: with their protocol and source; None where no evaluation was found.
        backbone: `name`, `weights`, `revision`, `hash`, `licence`, `gated`.
        data: a fingerprint of the training data.
        versions: of dinoseg and the libraries that wrote the file.
        choices: option of each config group.
        delta: whether the file holds only trained weights.
        dequantised: bits that weights had in training (`adapter.bits`), if the file holds them in float32. It then
            computes in float32, too, so that a few pixels differ. None: as trained.
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int
    normalisation: Mapping[str, Any] = field(default_factory=dict)
    pixels: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, Any] | None = None
    backbone: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    delta: bool = False
    dequantised: int | None = None

    @property
    def format(self) -> PixelFormat:
        """The format of the model's images."""
        return PixelFormat(**self.pixels)

    @property
    def example(self) -> str:
        """An example of an image's path, in whose name or folder other files of the image are found."""
        pixels = self.format
        if pixels.files:
            return f"{pixels.files[0]}/picture.png"
        return "picture.jpg" if pixels.is_rgb else "picture.tif"

    def part(self) -> dict[str, Any]:
        """Return all but the classes as plain values, as a file's description stores them under `facts`."""
        return {key: value for key, value in asdict(self).items() if key in _PART}

    def description(self) -> dict[str, Any]:
        """Return everything as plain values, from which `of` restores it."""
        colours = [list(colour) for colour in self.palette]
        labels = {"classes": list(self.classes), "palette": colours, "ignore_index": self.ignore_index}
        return {**labels, "facts": self.part()}

    @classmethod
    def of(cls, description: Mapping[str, Any], where: str) -> "ModelFacts":
        """Parse a file's description, which is not trusted; without `facts`, only its classes and colours are read.

        Unknown entries, as of a newer dinoseg, are ignored.

        Raises:
            UserError: if an entry is not of the form that dinoseg writes; `where` begins the message.
        """
        try:
            _LABELS(dict(description), "its description")
            labels = Labels.of(*(description[key] for key in ("classes", "palette", "ignore_index")))
            part = description.get("facts", {})
            forms.object_with()(part, "facts")
            known = {key: part[key] for key in _PART if key in part}
            for key, value in known.items():
                _PART[key](value, f"facts.{key}")
            PixelFormat(**known.get("pixels", {}))  # refuses values that contradict each other
        except (forms.SchemaError, UserError) as error:
            reason = str(error).removesuffix(".")
            raise UserError(f"{where}: {reason}. Choose another file, or export the model again.") from None
        return cls(labels.classes, labels.palette, labels.ignore_index, **known)
