"""Settings of label propagation on the feature grid: context frames, search window and matches."""

from dataclasses import dataclass
from typing import Literal

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, NotNegative, Positive

Window = Literal["circle", "square"]


@dataclass(frozen=True)
class MatchSettings:
    """Settings for propagating labels from earlier frames (the context) to the next frame; the defaults are DINOv3's.

    Attributes:
        context: number of recent frames stored besides frame 0, which is always stored.
        radius: radius of the window, in grid cells.
        window: "circle" (Euclidean distance) or "square" (the larger of both offsets).
        inclusive: whether a cell at exactly `radius` is inside.
        window_first: whether the window also limits the search in frame 0; for its repetitions it always does.
        repeat_first: whether frame 0 fills the context until enough frames were seen.
        top_k: number of best matches to use, over all context frames together.
        ties: whether all matches equal to the k-th best are used; otherwise exactly k, earlier frames first, then the
            upper left.
        temperature: divisor of the cosine similarities before the softmax over the top matches.

    Raises:
        UserError: the window holds no cell.
    """

    context: Count = 7
    radius: NotNegative = 12
    window: Window = "circle"
    inclusive: bool = True
    window_first: bool = True
    repeat_first: bool = False
    top_k: Count = 5
    ties: bool = True
    temperature: Positive = 0.2

    def __post_init__(self) -> None:
        if not self.inclusive and self.radius == 0:
            raise UserError("radius=0 with inclusive=false leaves no cell in the window. Give a radius above 0.")
