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


def test_overlapping_layers_mix_their_colours():
    frame = random_frame(1, 4)
    layers = np.array([[[0, 1, 0, 1]], [[0, 0, 1, 1]]], np.uint8)
    white = (frame + 255.0) / 2
    red = [(part + [200, 0, 0]) / 2 for part in (frame, white)]
    expected = np.stack([frame[:, 0], white[:, 1], red[0][:, 2], red[1][:, 3]], axis=1)
    assert np.abs(blend(frame, layers, PALETTE[:2]) - expected).max() <= 1


def test_a_blend_by_numpy_alone_is_the_same(monkeypatch):
    levels = np.arange(256, dtype=np.uint8)
    frame = np.repeat(levels, 256).reshape(256, 256)[..., None].repeat(3, axis=2)
    mask, palette = np.tile(levels, (256, 1)), [(level, (255 - level) // 2, 0) for level in range(255)]
    for opacity in np.linspace(0, 1, 21):
        monkeypatch.undo()
        usual = blend(frame, mask, palette, opacity=opacity)
        monkeypatch.setitem(sys.modules, "cv2", None)
        alone = blend(frame, mask, palette, opacity=opacity)
        # a processor without fused products rounds once more: a level here and there
        assert (alone == usual).mean() > 0.98 and np.abs(alone.astype(int) - usual).max() <= 1
        assert opacity not in (0, 0.5, 1) or np.array_equal(alone, usual)


def test_legend_lists_only_present_classes():
    masks = [np.array([[0, 2]], np.uint8), np.array([[255, 2]], np.uint8)]
    classes = ["ground", "car", "tree"]
    assert legend_of(masks, classes, PALETTE) == [
        ("ground", (0, 0, 0)),
        ("tree", (0, 100, 250)),
        ("ignored", IGNORE_COLOUR),
    ]
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


@pytest.mark.parametrize("size", [(192, 320), (1080, 1920), (40, 64), (1, 1), (400, 90), (3, 700)])
@pytest.mark.parametrize("with_reference", [True, False])
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
    top = next(
        row
        for row in range(picture.shape[0])
        if np.array_equal(picture[row, inked[0] : inked[0] + width * factor], enlarged[0])
    )
    shown = picture[top : top + height * factor, inked[0] : inked[0] + width * factor]
    assert np.array_equal(shown, enlarged)


def test_name_wider_than_the_image_widens_it():
    frame = random_frame(100, 300)
    name = "W" * 200
    narrow = side_by_side([("a", frame)], [("b", (1, 2, 3))])
    wide = side_by_side([("a", frame)], [(name, (1, 2, 3))])
    assert wide.shape[1] > narrow.shape[1]
    assert ink_columns(wide)[-1] < wide.shape[1] - 5


def test_letters_grow_with_the_frames():
    small = compare(random_frame(192, 320), np.zeros((192, 320), np.uint8), classes=["x"], palette=PALETTE)
    large = compare(random_frame(1080, 1920), np.zeros((1080, 1920), np.uint8), classes=["x"], palette=PALETTE)
    small_text, large_text = small.shape[0] - 192, large.shape[0] - 1080
    assert large_text > 3 * small_text


def test_letters_are_at_most_a_tenth_of_a_wide_frame():
    frame = np.zeros((20, 5000, 3), np.uint8)
    assert side_by_side([("a", frame), ("b", frame)], [("name", (1, 2, 3))]).shape[0] < 100
