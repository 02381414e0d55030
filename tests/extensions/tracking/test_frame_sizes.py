import math
from dataclasses import replace
from fractions import Fraction

import cv2
import numpy as np
import pytest
from mistakes import refusals
from PIL import Image

from dinoseg.extensions.tracking.propagation.features import input_size, resize
from dinoseg.extensions.tracking.propagation.settings import CRW, DINO, DINOV3, PropagationSettings
from dinoseg.utils.ranges import check_annotations


def reference(size, short, short_multiple, long_multiple, rounding):
    """As the protocols are written down, in exact fractions."""
    turn = {"up": math.ceil, "down": math.floor}[rounding]
    low, high = sorted(size)
    scaled = low if short is None else short
    new_low = max(1, turn(Fraction(scaled, short_multiple))) * short_multiple
    factor = Fraction(1) if short is None else Fraction(new_low, low)
    new_high = max(1, turn(high * factor / long_multiple)) * long_multiple
    return (new_low, new_high) if size[0] <= size[1] else (new_high, new_low)


@pytest.mark.parametrize(
    ("settings", "patch", "size", "expected"),
    [
        (DINOV3, 16, (480, 854), (960, 1712)),  # 60 x 107 cells
        (DINOV3, 16, (854, 480), (1712, 960)),
        (DINOV3, 16, (1080, 1920), (960, 1712)),
        (DINO, 8, (480, 854), (480, 832)),
        (DINO, 8, (1080, 1920), (480, 832)),
        (DINO, 8, (480, 480), (480, 448)),  # the longer side may become the shorter one
        (CRW, 8, (480, 854), (480, 856)),
        (replace(DINOV3, enlarge=False, rounding="down"), 16, (192, 320), (192, 320)),  # cfg/tracker/video.yaml
        (replace(DINOV3, enlarge=False, rounding="down"), 16, (330, 190), (320, 176)),
        (replace(DINOV3, enlarge=False, rounding="down"), 16, (1080, 1920), (960, 1696)),
    ],
)
def test_sizes_of_the_protocols(settings, patch, size, expected):
    assert input_size(size, settings, patch) == expected


def test_random_sizes_against_fractions():
    draw = np.random.default_rng(0)
    for _ in range(2000):
        patch = int(draw.choice([4, 8, 14, 16]))
        size = (int(draw.integers(1, 3000)), int(draw.integers(1, 3000)))
        short = None if draw.random() < 0.3 else int(draw.integers(1, 1500))
        long = None if draw.random() < 0.5 else patch * int(draw.integers(1, 9))
        rounding = str(draw.choice(["up", "down"]))
        settings = PropagationSettings(short_side=short, long_multiple=long, rounding=rounding)
        found = input_size(size, settings, patch)
        assert found == reference(size, short, patch, long or patch, rounding), (size, settings, patch)
        assert not found[0] % patch and not found[1] % patch


@pytest.mark.parametrize("size", [(30, 50), (90, 161), (40, 40)])
def test_resizing_is_that_of_the_papers_libraries(size):
    frame = np.random.default_rng(1).integers(0, 256, (60, 100, 3)).astype(np.uint8)
    assert np.array_equal(resize(frame, size, "bilinear"), cv2.resize(frame, size[::-1]))
    assert np.array_equal(
        resize(frame, size, "bicubic"), np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC))
    )
    assert resize(frame, (60, 100), "bicubic") is frame


SETTINGS = check_annotations(PropagationSettings)
test_bad_sizes_are_refused = refusals(
    {
        "short side of 0": (lambda: SETTINGS(short_side=0), "short_side=0 is out of range. Give a whole number of at"),
        "half a pixel": (lambda: SETTINGS(short_side=2.5), "short_side=2.5 is of type float. Give a whole number or"),
        "rounding": (lambda: SETTINGS(rounding="nearest"), "rounding=nearest is unknown. Choose one of up, down"),
        "resampling": (lambda: SETTINGS(resample="area"), "resample=area is unknown. Choose one of bilinear, bicubic"),
        "not of patches": (
            lambda: input_size((480, 854), DINO, 14),
            *("tracker.long_multiple=64 is not a multiple of the backbone's patch size, 14", "null"),
        ),
    }
)
