"""What a protocol of training-free label propagation fixes, and the three that papers report."""

from dataclasses import dataclass

from dinoseg.tracking.grid.settings import MatchSettings, check_at_least, check_one_of
from dinoseg.utils.ranges import Count


@dataclass(frozen=True)
class PropagationSettings(MatchSettings):
    """How labels travel, and how frames and masks are resized. The defaults are DINOv3's.

    Attributes:
        first: how frame 0's mask becomes labels: "nearest" (the id under each cell's centre, by Pillow),
            "nearest_exact" (by torch: another pixel where a centre lies between two) or "bilinear" (soft).
        upsample: how soft labels become pixels: "nearest", "bilinear", or "patch_bilinear" (bilinear to
            grid x patch size, decided there, then Pillow's nearest pixel).
        min_max: which channels are stretched to 0..1 over the frame before the largest wins: "none", "all" (a constant
            one becomes 0), or "positive" (those with a value above 0; a constant one wins everywhere).
        short: pixels of a frame's shorter side as the backbone sees it; None = as it is. It becomes a multiple of the
            patch size.
        enlarge: whether frames whose shorter side is below `short` are enlarged to it, as the protocols do.
        long_multiple: what the longer side becomes a multiple of, in pixels; None = the patch size.
        rounding: "up" or "down" to those multiples.
        resample: how frames are resized: "bilinear" (OpenCV's: it reads four pixels, however much is lost) or
            "bicubic" (Pillow's: it smooths where it reduces).

    Raises:
        UserError: for a value out of range or an unknown word.
    """

    first: str = "nearest_exact"
    upsample: str = "nearest"
    min_max: str = "all"
    short: Count | None = 960
    enlarge: bool = True
    long_multiple: Count | None = None
    rounding: str = "up"
    resample: str = "bicubic"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_of("first", self.first, ("nearest", "nearest_exact", "bilinear"))
        check_one_of("upsample", self.upsample, ("nearest", "bilinear", "patch_bilinear"))
        check_one_of("min_max", self.min_max, ("none", "all", "positive"))
        if self.short is not None:
            check_at_least("short", self.short, 1, "the pixels of a frame's shorter side; null leaves it as it is")
        if self.long_multiple is not None:
            check_at_least("long_multiple", self.long_multiple, 1, "a number of pixels; null stands for the patch size")
        check_one_of("rounding", self.rounding, ("up", "down"))
        check_one_of("resample", self.resample, ("bilinear", "bicubic"))


DINOV3 = PropagationSettings()
DINO = PropagationSettings(
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
CRW = PropagationSettings(
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
