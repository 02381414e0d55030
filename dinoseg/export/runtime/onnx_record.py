"""What an exported graph says of itself: which pictures it takes, and what is done with what it gives; no torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dinoseg.core.sizes import Size, backbone_size, kept_longest
from dinoseg.utils import forms
from dinoseg.utils.errors import UserError

KEY = "dinoseg"  # of the file's metadata: JSON of `graph` and of `portable.facts.Facts.description`
LARGEST_TEXT = 2**20  # bytes of that JSON
OUTPUTS = {  # names of what a graph of each kind gives
    "scores": ("scores",),
    "masks": ("class_logits", "mask_logits"),
    "pixels": ("scores",),
}
PRECISIONS = ("float32", "float16", "int8")
_SIDE = forms.whole(1, 2**15)


def _one_of(*names: str) -> forms.Form:
    def check(value: Any, where: str) -> None:
        if value not in names:
            raise forms.Misshapen(f"{where} is {value!r:.60}, and must be one of {', '.join(names)}")

    return check


_FORM = forms.record(
    version=forms.whole(1, 1),
    multiple=forms.whole(1, 1024),
    scale=forms.number(1e-3, 64.0),
    longest=forms.maybe(_SIDE),
    typical=forms.maybe(_SIDE),
    largest=forms.maybe(_SIDE),
    size=forms.maybe(forms.listing(_SIDE, 2)),
    batch=forms.maybe(forms.whole(1, 1024)),
    fill=forms.listing(forms.number(-1e6, 1e6), 3),
    kind=_one_of(*OUTPUTS),
    mixture=forms.flag,
    no_object=forms.flag,
    opset=forms.maybe(forms.whole(1, 1000)),
    precision=_one_of(*PRECISIONS),
)


@dataclass(frozen=True)
class Layout:
    """How a picture lies in the graph's input, from the top left."""

    content: Size  # rows and columns that it covers
    padded: Size  # of the input

    @property
    def valid(self) -> tuple[float, float]:
        """The share of the input's height and width that the picture covers."""
        return self.content[0] / self.padded[0], self.content[1] / self.padded[1]


@dataclass(frozen=True)
class GraphRecord:
    """How to ask an exported graph for a picture.

    The graph takes `image` (B, 3, H, W), float32 RGB in 0..1, and normalises inside. Its outputs are, by `kind`:
    `scores`: one map (B, K, h, w) of class scores over the whole input; `masks`: class logits (B, Q, K + 1) and mask
    logits (B, Q, h, w); `pixels`: class scores (B, K, H, W) of each pixel of the input.

    Attributes:
        multiple: H and W are multiples of it.
        scale: pixels of the input per pixel of the picture.
        longest: larger pictures are reduced until their longer side has so many pixels, before `scale`.
        typical: pictures larger than any of training are reduced to this; None: unknown.
        largest: the longer side above which they are.
        size: the only H and W that the graph takes; None: any.
        batch: the only B that it takes; None: any.
        fill: colour of the padding, which normalises to 0.
        kind: see above.
        mixture: whether scores are sums of probabilities, and no logits.
        no_object: whether the last column of class logits says "no object".
        opset: of ONNX; None for a program of torch.
        precision: in which weights are held; everything is computed in float32.
    """

    multiple: int
    scale: float
    longest: int | None
    typical: int | None
    largest: int | None
    size: Size | None
    batch: int | None
    fill: tuple[float, float, float]
    kind: str
    mixture: bool
    no_object: bool
    opset: int | None
    precision: str
    version: int = 1

    def layout(self, size: Size) -> Layout:
        """Return how a picture of this size (H, W) lies in the input.

        A graph of one size takes a picture whose own grid is another as large as fits, its shape kept.
        """
        longest = self.longest
        if self.typical is not None and self.largest is not None:
            longest = kept_longest(size, longest, self.typical, self.largest)
        content = backbone_size(size, self.scale, longest)
        padded = (math.ceil(content[0] / self.multiple), math.ceil(content[1] / self.multiple))
        padded = (padded[0] * self.multiple, padded[1] * self.multiple)
        if self.size is None or padded == self.size:
            return Layout(content, padded)
        factor = min(self.size[0] / content[0], self.size[1] / content[1])
        fitted = [max(1, min(round(side * factor), most)) for side, most in zip(content, self.size, strict=True)]
        return Layout((fitted[0], fitted[1]), self.size)

    def plain(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return asdict(self)

    @classmethod
    def of(cls, value: Any, where: str) -> "GraphRecord":
        """Return what a file says, which may come from anybody.

        Raises:
            UserError: something in it is not what dinoseg writes; `where` begins the message.
        """
        try:
            _FORM(value, "its description of the graph")
        except forms.Misshapen as error:
            raise UserError(f"{where}: {error}. Export the model again, with this version of dinoseg.") from None
        size = tuple(value["size"]) if value["size"] is not None else None
        return cls(**{**value, "size": size, "fill": tuple(value["fill"])})


def parse(text: str, where: str) -> Mapping[str, Any]:
    """Return the description that a file's metadata holds: `graph`, and what `Facts.of` reads.

    Raises:
        UserError: it is too long, or no such JSON.
    """
    try:
        if len(text) > LARGEST_TEXT:
            raise forms.Misshapen(f"it has {len(text)} letters, and {LARGEST_TEXT} are the most")
        return forms.parse_json(text, forms.holding(graph=forms.plain, classes=forms.plain))
    except forms.Misshapen as error:
        raise UserError(f"{where}: its description is damaged ({error}). Export the model again.") from None
