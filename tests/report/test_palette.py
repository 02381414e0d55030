import numpy as np
import pytest

from dinoseg.report.palette import IGNORE_COLOUR, colorize, default_palette


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
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (0, 4)])
def test_colorize_looks_each_pixel_up(ignore_index, shape):
    palette = [(1, 2, 3), (40, 50, 60), (250, 251, 252)]
    mask = np.random.default_rng(0).choice([0, 1, 2, ignore_index], shape).astype(np.uint8)
    picture = colorize(mask, palette, ignore_index)
    assert picture.shape == (*shape, 3) and picture.dtype == np.uint8
    for position, index in np.ndenumerate(mask):
        expected = IGNORE_COLOUR if index == ignore_index else palette[index]
        assert tuple(picture[position]) == expected


def test_an_id_without_a_colour_is_not_painted():
    with pytest.raises(ValueError, match="Class id 7 has no colour in a palette of 2"):
        colorize(np.array([[0, 7, 255]], dtype=np.uint8), [(0, 0, 0), (1, 1, 1)])
