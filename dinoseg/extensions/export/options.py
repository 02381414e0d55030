"""Options that graph exports share: keys of `export`, checked against one another before the model is built."""

import math
from dataclasses import dataclass

from dinoseg.core.sizes import Size
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, NotNegative, Share

LARGEST_SIDE = 2**15  # px, largest side of a fixed-size graph; `GraphRecord` accepts no larger one
MAX_PIXELS = 2**26


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """Options that ONNX files and programs share.

    Attributes:
        dynamic: leave batch and image size dynamic: True, False, or None for where backbone and head can.
        size: fixed (H, W) of the graph's input in px, multiples of the patch size; None: any, or the first image's
            where the graph cannot be dynamic.
        pixels: let a fixed-size graph output the class scores of each pixel, for use without dinoseg.
        images: images for the verification: a split of the data set, a folder or a pattern.
        count: largest number of these images.
        min_agreement: required share of pixels with the trained model's class.
        max_miou_drop: largest allowed difference in mIoU, in percentage points.
        gated: write weights whose licence restricts redistribution; do not share the file except on its terms.

    Raises:
        UserError: if the options contradict one another, or the size is invalid.
    """

    dynamic: bool | None = None
    size: tuple[Count, Count] | None = None
    pixels: bool = False
    images: str = "val"
    count: Count = 16
    min_agreement: Share = 0.999
    max_miou_drop: NotNegative = 0.1
    gated: bool = False

    def __post_init__(self) -> None:
        """Check the options against one another."""
        if self.size is not None:
            _check_size(self.size)
            if self.dynamic:
                raise UserError(f"export.size={list(self.size)} is one size: leave it out, or export.dynamic=true.")
        if self.pixels and self.dynamic:
            raise UserError(
                "export.pixels=true returns scores of each pixel, which needs a fixed size: set export.dynamic=false."
            )

    @property
    def fixed_size_reason(self) -> Size | None:
        """The requested (H, W); None where none is requested."""
        return None if self.size is None else (self.size[0], self.size[1])

    @property
    def why_fixed(self) -> str | None:
        """The reason why the options fix the graph's size, whatever backbone and head support; None: they do not."""
        if self.pixels:
            return "it returns scores of each pixel (export.pixels)"
        if self.size is not None:
            return "export.size is set"
        return "export.dynamic is false" if self.dynamic is False else None


def _check_size(size: Size) -> None:
    if max(size) > LARGEST_SIDE or math.prod(size) > MAX_PIXELS:
        side = math.isqrt(MAX_PIXELS)
        raise UserError(
            f"export.size={list(size)}: give at most {LARGEST_SIDE} px per side, and no more pixels than "
            f"[{side},{side}]."
        )
