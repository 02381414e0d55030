import sys

import numpy as np
import pytest

from dinoseg.report.overlay import blend, compare, legend_of, side_by_side
from dinoseg.report.palette import IGNORE_COLOUR, default_palette

PALETTE = [(0, 0, 0), (200, 0, 0), (0, 100, 250)]


def random_frame(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("opacity", [0.0, 0.3, 0.5, 1.0])
def test_blend_mixes_pixel_by_pixel_and_leaves_black_classes(opacity):
    frame = random_frame(6, 5)
    before = frame.copy()
    mask = np.random.default_rng(1).choice([0, 1, 2, 255], (6, 5)).astype(np.uint8)
    tinted = blend(frame, mask, PALETTE, opacity=opacity)
    colours = np.array([*PALETTE, IGNORE_COLOUR])[np.where(mask == 255, 3, mask)]
    expected = (1 - opacity) * frame + opacity * colours
    expected[(mask == 0) & (opacity < 1)] = frame[(mask == 0) & (opacity < 1)]
    assert np.abs(tinted - expected).max() <= 0.5 + 1e-3
    assert tinted.dtype == np.uint8
    assert np.array_equal(frame, before)


LAYER_COLOURS = [(250, 0, 250), (200, 0, 0), (0, 100, 250)]


def colours_in(picture):
    return {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}


@pytest.mark.parametrize("has_bools", [True, False])
def test_each_class_is_visible_where_layers_overlap(has_bools):
    layers = np.zeros((3, 60, 90), np.uint8)
    layers[0, 10:50, 10:80] = layers[1, 20:40, 20:40] = layers[2, 20:40, 30:60] = 1
    drawn = blend(random_frame(60, 90), layers.astype(bool) if has_bools else layers, LAYER_COLOURS, opacity=1)
    assert colours_in(drawn[24:36, 33:38]) == set(LAYER_COLOURS)  # all three, without an edge
    assert colours_in(drawn[24:36, 24:29]) == set(LAYER_COLOURS[:2])
    assert colours_in(drawn[12:18, 12:78]) == {LAYER_COLOURS[0]} and colours_in(drawn[:10]) == {(0, 0, 0)}


def test_layers_are_outlined_and_pixels_of_no_class_unchanged():
    frame = random_frame(60, 90)
    layers = np.zeros((3, 60, 90), np.uint8)
    layers[0, 10:50, 10:80] = 1
    layers[1, 20:40, 20:40] = 255
    drawn = blend(frame, layers, LAYER_COLOURS, opacity=0)
    assert (drawn[10:50, [10, 79]] == LAYER_COLOURS[0]).all() and (drawn[[10, 49], 10:80] == LAYER_COLOURS[0]).all()
    assert np.array_equal(drawn[12:18, 12:78], frame[12:18, 12:78]) and np.array_equal(drawn[:10], frame[:10])
    coloured = blend(frame, layers, LAYER_COLOURS, opacity=1)
    assert colours_in(coloured[24:36, 24:36]) == {LAYER_COLOURS[0], IGNORE_COLOUR}


@pytest.mark.parametrize("width", [0, 1, 3])
def test_outline_is_inside_the_region_and_in_its_full_colour(width):
    frame = random_frame(30, 40)
    mask = np.zeros((30, 40), np.uint8)
    mask[5:25, 5:20], mask[5:25, 20:35] = 1, 2
    drawn, plain = (blend(frame, mask, PALETTE, opacity=0.4, outline=each) for each in (width, 0))
    inner = np.zeros((30, 40), bool)
    for left in (5, 20):
        inner[5 + width : 25 - width, left + width : left + 15 - width] = True
    edge = (mask > 0) & ~inner
    assert np.array_equal(drawn[~edge], plain[~edge]) and np.array_equal(drawn[edge], np.array(PALETTE)[mask[edge]])


def test_default_outline_grows_with_the_frame():
    for side, width in ((40, 1), (1280, 3), (3840, 10)):
        mask = np.zeros((40, side), np.uint8)
        mask[:, side // 2 :] = 1
        shown = blend(np.full((40, side, 3), 9, np.uint8), mask, PALETTE, opacity=0, outline=None)
        assert ((shown[20] == PALETTE[1]).all(axis=1)).sum() == width


def test_a_blend_by_numpy_alone_is_the_same(monkeypatch):
    levels = np.arange(256, dtype=np.uint8)
    frame = np.repeat(levels, 256).reshape(256, 256)[..., None].repeat(3, axis=2)
    mask = np.tile(levels, (256, 1))
    palette = [(level, (255 - level) // 2, 0) for level in range(255)]
    for opacity in np.linspace(0, 1, 5):
        monkeypatch.undo()
        usual = blend(frame, mask, palette, opacity=opacity)
        layered = blend(frame, np.stack([mask > 100, mask < 200]), LAYER_COLOURS[:2])
        monkeypatch.setitem(sys.modules, "cv2", None)
        alone = blend(frame, mask, palette, opacity=opacity)
        # a processor without fused products rounds once more: a level here and there
        assert (alone == usual).mean() > 0.98 and np.abs(alone.astype(int) - usual).max() <= 1
        assert opacity not in (0, 0.5, 1) or np.array_equal(alone, usual)
        layers = np.stack([mask > 100, mask < 200])
        assert np.abs(blend(frame, layers, LAYER_COLOURS[:2]).astype(int) - layered).max() <= 1


def test_legend_lists_only_present_classes():
    masks = [np.array([[0, 2]], np.uint8), np.array([[255, 2]], np.uint8)]
    classes = ["ground", "car", "tree"]
    expected = [("ground", (0, 0, 0)), ("tree", (0, 100, 250)), ("ignored", IGNORE_COLOUR)]
    assert legend_of(masks, classes, PALETTE) == expected
    assert legend_of([], classes, PALETTE) == []


@pytest.mark.parametrize("opacity", [0.0, 0.6, 1.0])
def test_legend_has_palette_colours_at_any_opacity(opacity):
    mask = np.zeros((40, 64), np.uint8)
    mask[:, 32:] = 1
    picture = compare(random_frame(40, 64), mask, classes=["ground", "car"], palette=PALETTE, opacity=opacity)
    below = picture[-40:]  # the legend's row, clear of the frames, which are enlarged to 320 pixels
    for colour in PALETTE[:2]:
        assert ((below == colour).all(axis=2).sum(axis=1) > 10).sum() > 10  # a filled swatch, no letter


def ink_columns(picture):
    """Columns that are not plain white."""
    return np.flatnonzero((picture != 255).any(axis=(0, 2)))


@pytest.mark.parametrize(
    ("size", "with_reference"),
    [((192, 320), True), ((40, 64), False), ((1, 1), True), ((400, 90), False), ((3, 700), True)],
)
def test_compare_shows_the_frames_whole_and_cuts_no_label(size, with_reference):
    height, width = size
    frame = random_frame(height, width)
    mask = np.random.default_rng(2).integers(0, 12, size).astype(np.uint8)
    classes = [f"a class with the number {index}" for index in range(12)]
    reference = np.full(size, 255, np.uint8) if with_reference else None
    picture = compare(frame, mask, reference, classes=classes, palette=default_palette(12))
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    count = 3 if with_reference else 2
    factor = max(1, -(-300 // max(size)))
    assert picture.shape[0] > height * factor and picture.shape[1] >= count * width * factor
    inked = ink_columns(picture)
    assert inked[0] >= 5 and inked[-1] <= picture.shape[1] - 6  # a margin on both sides: nothing runs out
    # the frame stands in the picture pixel by pixel
    enlarged = frame.repeat(factor, axis=0).repeat(factor, axis=1)
    columns = picture[:, inked[0] : inked[0] + width * factor]
    top = next(row for row in range(len(columns)) if np.array_equal(columns[row], enlarged[0]))
    assert np.array_equal(columns[top : top + height * factor], enlarged)


def test_name_wider_than_the_image_widens_it():
    frame = random_frame(100, 300)
    name = "W" * 200
    narrow = side_by_side([("a", frame)], [("b", (1, 2, 3))])
    wide = side_by_side([("a", frame)], [(name, (1, 2, 3))])
    assert wide.shape[1] > narrow.shape[1]
    assert ink_columns(wide)[-1] < wide.shape[1] - 5


def test_letters_grow_with_the_frames():
    heights = []
    for height, width in ((192, 320), (1080, 1920)):
        mask = np.zeros((height, width), np.uint8)
        heights.append(compare(random_frame(height, width), mask, classes=["x"], palette=PALETTE).shape[0] - height)
    assert heights[1] > 3 * heights[0]
    frame = np.zeros((20, 5000, 3), np.uint8)  # of whose height letters are at most a tenth
    assert side_by_side([("a", frame), ("b", frame)], [("name", (1, 2, 3))]).shape[0] < 100
