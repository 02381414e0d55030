"""What a protocol of training-free label propagation fixes, and the three that papers report."""

from collections.abc import Sequence
from dataclasses import dataclass

from dinoseg.errors import UserError
from dinoseg.ranges import Count, NotNegative, Positive


@dataclass(frozen=True)
class Settings:
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
        first: how frame 0's mask becomes labels: "nearest" (the id under each cell's centre, by Pillow),
            "nearest_exact" (by torch: another pixel where a centre lies between two) or "bilinear" (soft).
        upsample: how soft labels become pixels: "nearest", "bilinear", or "patch_bilinear" (bilinear to
            grid x patch size, decided there, then Pillow's nearest pixel).
        min_max: which channels are stretched to 0..1 over the frame before the largest wins: "none", "all" (a constant
            one becomes 0), or "positive" (those with a value above 0; a constant one wins everywhere).
        short: pixels of a frame's shorter side as the backbone sees it; None = as it is. It becomes a multiple of the
            patch size.
        long_multiple: what the longer side becomes a multiple of, in pixels; None = the patch size.
        rounding: "up" or "down" to those multiples.
        resample: how frames are resized: "bilinear" (OpenCV's: it reads four pixels, however much is lost) or
            "bicubic" (Pillow's: it smooths where it reduces).

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
    first: str = "nearest_exact"
    upsample: str = "nearest"
    min_max: str = "all"
    short: Count | None = 960
    long_multiple: Count | None = None
    rounding: str = "up"
    resample: str = "bicubic"

    def __post_init__(self) -> None:
        _at_least("context", self.context, 1, "the number of earlier frames that are searched")
        _at_least("top_k", self.top_k, 1, "the number of matches that count")
        if not self.radius >= 0:
            raise UserError(f"radius={self.radius} is no distance. Give the window's reach in grid cells, 0 or more.")
        if not self.inclusive and self.radius == 0:
            raise UserError("radius=0 with inclusive=false leaves no cell in the window. Give a radius above 0.")
        if not 0 < self.temperature < float("inf"):
            raise UserError(
                f"temperature={self.temperature} must be above 0 and finite. The protocols have 0.05 to 0.2."
            )
        _one_of("window", self.window, ("circle", "square"))
        _one_of("first", self.first, ("nearest", "nearest_exact", "bilinear"))
        _one_of("upsample", self.upsample, ("nearest", "bilinear", "patch_bilinear"))
        _one_of("min_max", self.min_max, ("none", "all", "positive"))
        if self.short is not None:
            _at_least("short", self.short, 1, "the pixels of a frame's shorter side; null leaves it as it is")
        if self.long_multiple is not None:
            _at_least("long_multiple", self.long_multiple, 1, "a number of pixels; null stands for the patch size")
        _one_of("rounding", self.rounding, ("up", "down"))
        _one_of("resample", self.resample, ("bilinear", "bicubic"))


# How frames and masks are resized: what works on the feature grid alone does not read these.
OF_PIXELS = ("first", "upsample", "min_max", "short", "long_multiple", "rounding", "resample")


def _at_least(key: str, value: int, least: int, meaning: str) -> None:
    if value < least or value != int(value):
        raise UserError(f"{key}={value} must be a whole number, {least} or more. It is {meaning}.")


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{key}={value} is unknown. Choose one of: {', '.join(known)}.")


DINOV3 = Settings()
DINO = Settings(
    window="square",
    temperature=0.1,
    first="nearest",
    upsample="patch_bilinear",
    min_max="positive",
    short=480,
    long_multiple=64,
    rounding="down",
    resample="bilinear",
)
CRW = Settings(
    context=20,
    inclusive=False,
    window_first=False,
    repeat_first=True,
    top_k=10,
    ties=False,
    temperature=0.05,
    first="bilinear",
    upsample="bilinear",
    min_max="none",
    short=None,
    resample="bilinear",
)
