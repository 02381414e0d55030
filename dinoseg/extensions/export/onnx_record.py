"""Description of an exported graph: the images that it takes and the processing of its outputs; imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dinoseg.core.sizes import Size, backbone_size, reduced_longest
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import format_value

KEY = "dinoseg"  # metadata key: JSON of `graph` and of `ModelFacts.description`
OUTPUTS = {  # kind of graph to the names of its outputs
    "scores": ("scores",),
    "masks": ("class_logits", "mask_logits"),
    "pixels": ("scores",),
}
PRECISIONS = ("float32", "float16", "int8")
_SIDE = forms.whole(1, 2**15)


def _one_of(*names: str) -> forms.Form:
    def check(value: Any, where: str) -> None:
        if value not in names:
            raise forms.SchemaError(f"{where} is {format_value(value, 60)}; it must be one of {', '.join(names)}")

    return check


_FORM = forms.record(
    version=forms.whole(1, 1),
    multiple=forms.whole(1, 1024),
    scale=forms.number(1e-3, 64.0),
    longest=forms.maybe(_SIDE),
    typical=forms.maybe(_SIDE),
    largest=forms.maybe(_SIDE),
    size=forms.maybe(forms.list_of(_SIDE, 2)),
    batch=forms.maybe(forms.whole(1, 1024)),
    fill=forms.list_of(forms.number(-1e6, 1e6)),
    kind=_one_of(*OUTPUTS),
    mixture=forms.flag,
    no_object=forms.flag,
    opset=forms.maybe(forms.whole(1, 1000)),
    precision=_one_of(*PRECISIONS),
    thresholds=forms.maybe(forms.list_of(forms.number(0, 1))),
    objects=forms.maybe(
        forms.record(
            things=forms.list_of(forms.whole(0, 255)),
            background=forms.maybe(forms.whole(0, 255)),
            max_instances=forms.maybe(forms.whole(1)),
            score_threshold=forms.maybe(forms.number(0, 1)),
            overlap_threshold=forms.maybe(forms.number(0, 1)),
        )
    ),
)


@dataclass(frozen=True)
class Layout:
    """Placement of an image in the graph's input, from the top left."""

    content: Size  # rows and columns that the image covers
    padded: Size  # rows and columns of the input

    @property
    def valid(self) -> tuple[float, float]:
        """The shares of the input's height and width that the image covers."""
        return self.content[0] / self.padded[0], self.content[1] / self.padded[1]


@dataclass(frozen=True)
class GraphRecord:
    """Description of an exported graph's input and outputs.

    The graph takes `image` (B, C, H, W), float32 in 0..1, and normalises inside; three channels are RGB. Its outputs
    are, by `kind`: `scores`: one map (B, K, h, w) of class scores over the whole input; `masks`: class logits
    (B, Q, K + 1) and mask logits (B, Q, h, w); `pixels`: class scores (B, K, H, W) of each pixel of the input.

    Attributes:
        multiple: H and W are multiples of it.
        scale: pixels of the input per pixel of the image.
        longest: longer side in px to which larger images are reduced, before `scale`.
        typical: longer side in px to which images larger than all training images are reduced; None: unknown.
        largest: the longer side above which an image counts as larger than these.
        size: the fixed H and W of the graph; None: any.
        batch: the fixed B of the graph; None: any.
        fill: value of the padding in each of the C channels, which normalises to 0.
        kind: see above.
        mixture: whether scores are sums of probabilities instead of logits.
        no_object: whether the last column of class logits stands for "no object".
        opset: of ONNX; None for a torch program.
        precision: of the stored weights; the graph computes in float32.
        thresholds: sigmoids from which a class is predicted, of a multi-label model; None: one class per pixel.
        objects: options of `objects.find_segments`, or of `find_instances` if `score_threshold` is None; `background`:
            the class of pixels in no instance, if there is one. None: the model predicts no objects.
    """

    multiple: int
    scale: float
    longest: int | None
    typical: int | None
    largest: int | None
    size: Size | None
    batch: int | None
    fill: tuple[float, ...]
    kind: str
    mixture: bool
    no_object: bool
    opset: int | None
    precision: str
    thresholds: Sequence[float] | None = None
    objects: Mapping[str, Any] | None = None
    version: int = 1

    def layout(self, size: Size) -> Layout:
        """Return the placement of an image of `size` (H, W) in the input.

        A fixed-size graph takes other images scaled to the largest size that fits, with their aspect ratio preserved.
        """
        longest = self.longest
        if self.typical is not None and self.largest is not None:
            longest = reduced_longest(size, longest, self.typical, self.largest)
        content = backbone_size(size, self.scale, longest)
        padded = (math.ceil(content[0] / self.multiple), math.ceil(content[1] / self.multiple))
        padded = (padded[0] * self.multiple, padded[1] * self.multiple)
        if self.size is None or padded == self.size:
            return Layout(content, padded)
        factor = min(self.size[0] / content[0], self.size[1] / content[1])
        fitted = [max(1, min(round(side * factor), most)) for side, most in zip(content, self.size, strict=True)]
        return Layout((fitted[0], fitted[1]), self.size)

    def plain(self) -> dict[str, Any]:
        """Return the record as JSON-compatible values."""
        return asdict(self)

    @classmethod
    def of(cls, value: Any, where: str) -> "GraphRecord":
        """Parse a record from a file, which is not trusted.

        Raises:
            UserError: if an entry is not of the form that dinoseg writes; `where` begins the message.
        """
        try:
            _FORM(value, "its description of the graph")
        except forms.SchemaError as error:
            raise UserError(f"{where}: {error}. Export the model again, with this version of dinoseg.") from None
        size = tuple(value["size"]) if value["size"] is not None else None
        return cls(**{**value, "size": size, "fill": tuple(value["fill"])})


def parse(text: str, where: str) -> Mapping[str, Any]:
    """Parse the description in a file's metadata: `graph`, and the entries that `ModelFacts.of` reads.

    Raises:
        UserError: if it is another JSON.
    """
    try:
        return forms.parse_json(text, forms.object_with(graph=forms.plain, classes=forms.plain))
    except forms.SchemaError as error:
        raise UserError(f"{where}: its description is damaged ({error}). Export the model again.") from None
