import cv2
import numpy as np
import pytest
from PIL import Image

from dinoseg.report.palette import IGNORE_COLOUR, default_palette, lookup_table, palette_image

# linear RGB as seen by trichromats and dichromats: G. M. Machado et al., 2009, severity 1
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


@pytest.mark.parametrize("num_classes", [1, 2, 10, 150, 256])
def test_default_colours_are_distinct_and_stable(num_classes):
    palette = default_palette(num_classes)
    assert len(palette) == num_classes == len(set(palette))
    assert palette[0] == (0, 0, 0)
    assert palette == default_palette(256)[:num_classes]
    assert IGNORE_COLOUR not in palette
    assert all(type(level) is int and 0 <= level <= 255 for colour in palette for level in colour)


def cielab(colours, vision):
    """Return CIELAB values (N, 3) under D65 of sRGB colours (N, 3) in 0..255, as a vision sees them."""
    levels = np.asarray(colours) / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(VISIONS[vision]).T, 0, 1).astype(np.float32)
    return cv2.cvtColor(seen[None], cv2.COLOR_LRGB2Lab)[0].astype(float)


def ciede2000(first, second):
    """Return the differences (N, M) of CIELAB values (N, 3) and (M, 3), by CIE 142-2001."""
    (light_1, a_1, b_1), (light_2, a_2, b_2) = np.moveaxis(first[:, None], -1, 0), np.moveaxis(second[None], -1, 0)
    grey = ((np.hypot(a_1, b_1) + np.hypot(a_2, b_2)) / 2) ** 7
    stretch = 1.5 - np.sqrt(grey / (grey + 25**7)) / 2
    chroma_1, chroma_2 = np.hypot(a_1 * stretch, b_1), np.hypot(a_2 * stretch, b_2)
    hue_1, hue_2 = np.arctan2(b_1, a_1 * stretch), np.arctan2(b_2, a_2 * stretch)
    turn = (hue_2 - hue_1 + np.pi) % (2 * np.pi) - np.pi
    hue = hue_1 + turn / 2 * (chroma_1 * chroma_2 > 0)
    light, chroma = (light_1 + light_2) / 2 - 50, (chroma_1 + chroma_2) / 2
    waves = ((-0.17, 1, 30), (0.24, 2, 0), (0.32, 3, -6), (-0.2, 4, 63))
    weight = 1 + sum(size * np.cos(times * hue - np.radians(shift)) for size, times, shift in waves)
    by_light = (light_2 - light_1) / (1 + 0.015 * light**2 / np.sqrt(20 + light**2))
    by_chroma = (chroma_2 - chroma_1) / (1 + 0.045 * chroma)
    by_hue = 2 * np.sqrt(chroma_1 * chroma_2) * np.sin(turn / 2) / (1 + 0.015 * chroma * weight)
    blue = np.exp(-((((np.degrees(hue) - 275 + 180) % 360 - 180) / 25) ** 2))
    rotation = -2 * np.sqrt(chroma**7 / (chroma**7 + 25**7)) * np.sin(np.radians(60) * blue)
    return np.sqrt(by_light**2 + by_chroma**2 + by_hue**2 + rotation * by_chroma * by_hue)


@pytest.mark.parametrize(
    ("first", "second", "expected"),  # G. Sharma et al., 2005, table 1
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((50, 2.5, 0), (58, 24, 15), 19.4535),
        ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
        ((90.9257, -0.5406, -0.9208), (88.6381, -0.8985, -0.7239), 1.5381),
    ],
)
def test_ciede2000_has_the_published_differences(first, second, expected):
    assert ciede2000(np.array([first]), np.array([second])).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("vision", VISIONS)
def test_first_default_colours_differ_with_colour_blindness(vision):
    colours = cielab([*default_palette(9), IGNORE_COLOUR], vision)
    differences = ciede2000(colours, colours)
    assert differences[~np.eye(10, dtype=bool)].min() > 14


def test_further_default_colours_differ_from_ignored_pixels():
    colours, ignored = (cielab(each, "normal") for each in (default_palette(64), [IGNORE_COLOUR]))
    assert ciede2000(colours, ignored).min() > 14.9


@pytest.mark.parametrize("ignore_index", [255, 3])
def test_lookup_table_has_a_colour_for_each_id(ignore_index):
    palette = [(1, 2, 3), (40, 50, 60), (250, 251, 252)]
    table = lookup_table(palette, ignore_index)
    assert table.shape == (256, 3) and table.dtype == np.uint8
    np.testing.assert_array_equal(table[:3], palette)
    assert tuple(table[ignore_index]) == IGNORE_COLOUR


@pytest.mark.parametrize("largest", [2, 255])
def test_ids_without_a_colour_are_stored_and_look_ignored(largest, tmp_path):
    ids = np.array([[0, 1, largest]], np.uint8)
    palette_image(ids, [(1, 2, 3)] * 2).save(tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    assert np.array_equal(np.asarray(image), ids) and image.convert("RGB").getpixel((2, 0)) == IGNORE_COLOUR
