"""Settings of training-free label propagation, with the published protocols of DINOv3, DINO and CRW."""

from dataclasses import dataclass
from typing import Literal

from dinoseg.extensions.tracking.grid.settings import MatchSettings
from dinoseg.utils.ranges import Count


@dataclass(frozen=True)
class PropagationSettings(MatchSettings):
    """Settings of label propagation and of the resizing of frames and masks; the defaults are DINOv3's.

    Attributes:
        first: conversion of frame 0's mask to labels: "nearest" (the ID under each cell's centre, by Pillow),
            "nearest_exact" (by torch: another pixel if a centre lies between two) or "bilinear" (soft).
        upsample: conversion of soft labels to pixels: "nearest", "bilinear", or "patch_bilinear" (bilinear to
            grid x patch size, argmax there, then Pillow's nearest pixel).
        min_max: channels that are rescaled to 0..1 over the frame before the argmax: "none", "all" (constant channels
            become 0), or "positive" (those with a value above 0; a constant one wins everywhere).
        short_side: pixels of a frame's shorter side at the backbone's input, rounded to a multiple of the patch size;
            None: the original size, also rounded.
        enlarge: whether frames whose shorter side is below `short_side` are enlarged to it, as in the protocols.
        long_multiple: multiple in pixels to which the longer side is rounded; None: the patch size.
        rounding: direction of rounding to these multiples, "up" or "down".
        resample: resizing of frames: "bilinear" (OpenCV, reads four pixels even when downsampling) or "bicubic"
            (Pillow, anti-aliased when downsampling).

    Raises:
        UserError: a value is out of range, or an option is unknown.
    """

    first: Literal["nearest", "nearest_exact", "bilinear"] = "nearest_exact"
    upsample: Literal["nearest", "bilinear", "patch_bilinear"] = "nearest"
    min_max: Literal["none", "all", "positive"] = "all"
    short_side: Count | None = 960
    enlarge: bool = True
    long_multiple: Count | None = None
    rounding: Literal["up", "down"] = "up"
    resample: Literal["bilinear", "bicubic"] = "bicubic"


# facebookresearch/dinov3, notebooks/segmentation_tracking.ipynb
DINOV3 = PropagationSettings()
# facebookresearch/dino, eval_video_segmentation.py
DINO = PropagationSettings(
    window="square",
    temperature=0.1,
    first="nearest",
    upsample="patch_bilinear",
    min_max="positive",
    short_side=480,
    long_multiple=64,
    rounding="down",
    resample="bilinear",
)
# ajabri/videowalk, test.py, with the temperature of its README (the code's default is 0.07)
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
    short_side=None,
    resample="bilinear",
)
