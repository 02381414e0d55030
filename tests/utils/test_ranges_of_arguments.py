"""Ranges in annotations include or exclude their ends as their rules say."""

import pytest

from dinoseg.utils import ranges
from dinoseg.utils.errors import UserError

TINY = 1e-9


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("Count", (1, 10**9), (0,)),
        ("Few", (1, 16), (0, 17)),
        ("UpTo255", (1, 255), (0, 256)),
        ("Natural", (0, 10**9), (-1,)),
        ("Byte", (0, 255), (-1, 256)),
        ("Positive", (TINY, 1e9), (0.0,)),
        ("NotNegative", (0.0, 1e9), (-TINY,)),
        ("Share", (0.0, 1.0), (-TINY, 1 + TINY)),
        ("LowShare", (0.0, 1 - TINY), (-TINY, 1.0)),
        ("HighShare", (TINY, 1.0), (0.0, 1 + TINY)),
        ("OpenShare", (TINY, 1 - TINY), (0.0, 1.0)),
        ("HalfShare", (0.0, 0.5), (-TINY, 0.5 + TINY)),
        ("Scale", (TINY, 16.0), (0.0, 16 + TINY)),
        ("Temperature", (0.01, 100.0), (0.01 - TINY, 100 + TINY)),
        ("LearningRate", (TINY, 100.0), (0.0, 100 + TINY)),
        ("RateFactor", (0.0, 100.0), (-TINY, 100 + TINY)),
        ("ColourMean", (-1.0, 2.0), (-1 - TINY, 2 + TINY)),
        ("ColourStd", (0.001, 10.0), (0.001 - TINY, 10 + TINY)),
    ],
)
def test_range_holds_its_ends(name, allowed, refused):
    annotation = getattr(ranges, name)
    for value in allowed:
        ranges.check_value("value", value, annotation)
    for value in refused:
        with pytest.raises(UserError, match="is out of range"):
            ranges.check_value("value", value, annotation)
