"""What every export of a graph is asked for: keys of `export`, held against one another before a model is made."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dinoseg.core.sizes import Size
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, NotNegative, Share

LARGEST_SIDE = 2**15  # pixels of a graph's one size: what a file may say of itself
MOST_PIXELS = 2**26


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """The keys that ONNX files and programs share.

    Attributes:
        dynamic: leave batch and size open: True, False, or None where backbone and head can.
        size: the only (H, W) that it takes, in its own pixels, multiples of the patches; None: any, or that of the
            first picture where it cannot be open.
        pixels: let the graph of one size give class scores of each pixel itself, for use without dinoseg.
        images: pictures that it is proven on: a split of the data set, a folder or a pattern.
        count: at most so many of them.
        least_agreement: share of pixels that must have the model's class.
        most_points: of mIoU that it may differ by, in points of 100.
        gated: write weights into the file whose licence forbids passing them on freely: it goes no further.

    Raises:
        UserError: they contradict one another, or the size is none of a graph.
    """

    dynamic: bool | None = None
    size: Sequence[Count] | None = None
    pixels: bool = False
    images: str = "val"
    count: Count = 16
    least_agreement: Share = 0.999
    most_points: NotNegative = 0.1
    gated: bool = False

    def __post_init__(self) -> None:
        """Hold them against one another."""
        if self.size is not None:
            _check_size(self.size)
            if self.dynamic:
                raise UserError(f"export.size={list(self.size)} is one size: leave it out, or export.dynamic=true.")
        if self.pixels and self.dynamic:
            raise UserError(
                "export.pixels=true gives scores of each pixel, which takes one size: set export.dynamic=false."
            )

    @property
    def one_size(self) -> Size | None:
        """The (H, W) asked for."""
        return None if self.size is None else (self.size[0], self.size[1])

    @property
    def why_fixed(self) -> str | None:
        """Why the graph is to have one size, whatever backbone and head can; None: nothing says so."""
        if self.pixels:
            return "it gives scores of each pixel (export.pixels)"
        if self.size is not None:
            return "export.size says so"
        return "export.dynamic says so" if self.dynamic is False else None


def _check_size(size: Sequence[int]) -> None:
    if len(size) != 2:
        raise UserError(f"export.size={list(size)}: give [H,W], such as [512,512], or null.")
    if max(size) > LARGEST_SIDE or math.prod(size) > MOST_PIXELS:
        side = math.isqrt(MOST_PIXELS)
        raise UserError(
            f"export.size={list(size)}: give at most {LARGEST_SIDE} px a side, and no more pixels than [{side},{side}]."
        )
