"""How labels travel over the feature grid: the context that is searched, and the matches that count."""

from collections.abc import Sequence
from dataclasses import dataclass

from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, NotNegative, Positive


@dataclass(frozen=True)
class MatchSettings:
    """How labels travel from the frames seen so far (the context) to the next one. The defaults are DINOv3's.

    Attributes:
        context: frames kept beside frame 0, which always stays.
        radius: reach of the window, in grid cells.
        window: "circle" (Euclidean distance) or "square" (the larger of both offsets).
        inclusive: whether a cell at exactly `radius` is inside.
        window_first: whether the window also limits the search in frame 0; in its repetitions it always does.
        repeat_first: whether frame 0 fills the context until enough frames were seen.
        top_k: best matches that count, of all context frames together.
        ties: whether all that equal the k-th best count too; otherwise exactly k do, of equal ones the earlier
            frame's first, then the upper left.
        temperature: divides the cosine similarities before their softmax over the kept matches.

    Raises:
        UserError: for a value out of range or an unknown word.
    """

    context: Count = 7
    radius: NotNegative = 12
    window: str = "circle"
    inclusive: bool = True
    window_first: bool = True
    repeat_first: bool = False
    top_k: Count = 5
    ties: bool = True
    temperature: Positive = 0.2

    def __post_init__(self) -> None:
        check_at_least("context", self.context, 1, "the number of earlier frames that are searched")
        check_at_least("top_k", self.top_k, 1, "the number of matches that count")
        if not self.radius >= 0:
            raise UserError(f"radius={self.radius} is no distance. Give the window's reach in grid cells, 0 or more.")
        if not self.inclusive and self.radius == 0:
            raise UserError("radius=0 with inclusive=false leaves no cell in the window. Give a radius above 0.")
        if not 0 < self.temperature < float("inf"):
            raise UserError(
                f"temperature={self.temperature} must be above 0 and finite. The protocols have 0.05 to 0.2."
            )
        check_one_of("window", self.window, ("circle", "square"))


def check_at_least(key: str, value: int, least: int, meaning: str) -> None:
    """Refuse a value below a whole number, or between two."""
    if value < least or value != int(value):
        raise UserError(f"{key}={value} must be a whole number, {least} or more. It is {meaning}.")


def check_one_of(key: str, value: str, known: Sequence[str]) -> None:
    """Refuse a word that is not known."""
    if value not in known:
        raise UserError(f"{key}={value} is unknown. Choose one of: {', '.join(known)}.")
