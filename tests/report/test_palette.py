import numpy as np
import pytest

from dinoseg.report.palette import IGNORE_COLOUR, default_palette, lookup_table


@pytest.mark.parametrize("num_classes", [1, 2, 10, 150, 256])
def test_default_colours_are_distinct_and_stable(num_classes):
    palette = default_palette(num_classes)
    assert len(palette) == num_classes == len(set(palette))
    assert palette[0] == (0, 0, 0)
    assert palette == default_palette(256)[:num_classes]
    assert IGNORE_COLOUR not in palette
    assert all(type(level) is int and 0 <= level <= 255 for colour in palette for level in colour)


def test_the_first_colours_are_far_apart():
    colours = np.array(default_palette(12), dtype=float)
    distances = np.abs(colours[:, None] - colours[None]).max(axis=2)
    assert distances[~np.eye(12, dtype=bool)].min() >= 70


@pytest.mark.parametrize("num_classes", [0, -1, 257])
def test_impossible_palettes_are_refused(num_classes):
    with pytest.raises(ValueError, match="1 to 256"):
        default_palette(num_classes)


@pytest.mark.parametrize("ignore_index", [255, 3])
def test_lookup_table_has_a_colour_for_each_id(ignore_index):
    palette = [(1, 2, 3), (40, 50, 60), (250, 251, 252)]
    table = lookup_table(palette, ignore_index)
    assert table.shape == (256, 3) and table.dtype == np.uint8
    np.testing.assert_array_equal(table[:3], palette)
    assert tuple(table[ignore_index]) == IGNORE_COLOUR
