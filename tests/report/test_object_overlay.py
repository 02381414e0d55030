"""Figures of single objects over a frame."""

from itertools import combinations

import numpy as np
import pytest
from PIL import ImageDraw

from dinoseg.core.objects import Objects
from dinoseg.report.object_overlay import colour_objects, draw_objects, object_legend
from dinoseg.report.overlay import default_outline
from dinoseg.report.palette import default_palette

PALETTE = default_palette(3)
FRAME = np.full((80, 120, 3), 100, np.uint8)


def make_masks():
    masks = np.zeros((3, 80, 120), bool)
    masks[0, 10:50, 10:60] = True
    masks[1, 30:70, 40:100] = True  # the first one is on top of it
    masks[2, 60:78, 5:30] = True
    return masks


def test_best_object_is_on_top_and_outlined():
    drawn = draw_objects(FRAME, Objects.of_masks(make_masks(), [1, 2, 1], [0.9, 0.8, 0.7]), PALETTE)
    half = [tuple(np.round((100 + np.array(colour)) / 2).astype(int)) for colour in PALETTE]
    assert tuple(drawn[12, 12]) == half[1] and tuple(drawn[45, 45]) == half[1]
    assert tuple(drawn[67, 97]) == half[2] and tuple(drawn[75, 100]) == (100, 100, 100)
    assert tuple(drawn[10, 30]) == PALETTE[1] and tuple(drawn[69, 70]) == PALETTE[2]
    assert np.array_equal(FRAME, np.full_like(FRAME, 100))


def test_objects_of_low_scores_are_left_out():
    objects = Objects.of_masks(make_masks(), [1, 2, 1], [0.9, 0.8, 0.4])
    drawn = draw_objects(FRAME, objects.select_distinct(), PALETTE)
    assert tuple(drawn[70, 10]) == (100, 100, 100)
    assert tuple(draw_objects(FRAME, objects.select_distinct(0.4), PALETTE)[70, 10]) != (100, 100, 100)
    assert object_legend(objects.select([2]).select_distinct(0.5), "abc", PALETTE) == []
    assert object_legend(objects, "abc", PALETTE) == [("b", PALETTE[1]), ("c", PALETTE[2])]


def test_black_classes_have_a_white_outline_alone():
    objects = Objects.of_masks(make_masks()[:1], [0], [0.9])
    drawn = draw_objects(FRAME, objects, PALETTE)
    assert tuple(drawn[10, 30]) == (255, 255, 255) and tuple(drawn[12, 12]) == (100, 100, 100)
    assert tuple(draw_objects(FRAME, objects, PALETTE, opacity=1)[12, 12]) == (0, 0, 0)


def test_numbers_lie_inside_their_objects():
    masks = make_masks()
    drawn = draw_objects(FRAME, Objects.of_masks(masks[2:], [1], [0.9]), PALETTE)
    white = (drawn == 255).all(axis=-1)
    assert white.any() and not (white & ~masks[2]).any()


def make_crowd(rng, count):
    """Return boxes of 10 to 50 pixels of two classes, and one of a third class, in an image of 160 x 240."""
    masks = np.zeros((count, 160, 240), bool)
    for mask in masks:
        top, left = rng.integers(0, (150, 230))
        mask[top : top + rng.integers(10, 50), left : left + rng.integers(10, 50)] = True
    return Objects.of_masks(masks, [3, *rng.integers(1, 3, count - 1)])


def test_neighbours_differ_and_a_single_object_has_the_colour_of_its_class():
    palette = default_palette(4)
    for seed in range(20):
        objects = make_crowd(np.random.default_rng(seed), 14)
        colours = colour_objects(objects, palette)
        assert colours[0] == palette[3] and palette[3] not in colours[1:]
        for (one, left), (other, right) in combinations(enumerate(objects.boxes), 2):
            gaps = np.maximum(left, right)[:2] - np.minimum(left[:2] + left[2:], right[:2] + right[2:])
            if (gaps < 0.05 * 240).all():
                assert colours[one] != colours[other]


def test_objects_far_apart_have_different_colours_too():
    masks = np.zeros((6, 160, 240), bool)
    for number, mask in enumerate(masks):
        mask[:5, 40 * number : 40 * number + 5] = True
    assert len({*colour_objects(Objects.of_masks(masks, [1] * 6), PALETTE)}) == 6


def test_a_colour_of_no_neighbour_is_better_than_a_rare_one():
    masks = np.zeros((14, 20, 1400), bool)
    for place, mask in enumerate(masks[:13]):  # the last one has the colour of the first, all others another
        mask[5:9, 100 * place : 100 * place + 10] = True
    masks[13, 5:15, 100:1110] = True  # near all but these two
    colours = colour_objects(Objects.of_masks(masks, [1] * 14), default_palette(2))
    assert colours[0] == colours[12] == colours[13] and len({*colours}) == 12


def test_numbers_never_cover_one_another(monkeypatch):
    shown = []

    def record(pen, place, text, _, font, anchor, stroke_width, stroke_fill):
        box = pen.textbbox(place, text, font, anchor, stroke_width=stroke_width)
        shown.append((int(text) - 1, place, box))

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    frame = np.zeros((160, 240, 3), np.uint8)
    for seed in range(5):
        objects = make_crowd(np.random.default_rng(seed), 60)
        shown.clear()
        draw_objects(frame, objects, default_palette(4))
        assert len(shown) > 20 and shown[0][0] == 0
        for number, (x, y), _ in shown:
            assert objects.masks[number].to_mask(objects.size)[y, x]
        for (*_, one), (*_, other) in combinations(shown, 2):
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def test_no_objects_leave_the_frame_unchanged():
    empty = Objects.of_masks(np.zeros((0, 80, 120), bool), [], [])
    assert np.array_equal(draw_objects(FRAME, empty, PALETTE), FRAME)


@pytest.mark.parametrize("size", [(120, 190), (120, 1200)])
def test_outlines_lie_on_all_sides_within_the_object(size):
    width = default_outline(size)
    mask = np.zeros((1, *size), bool)
    left = size[1] - 170
    mask[0, 10:110, left : left + 150] = True
    drawn = draw_objects(np.zeros((*size, 3), np.uint8), Objects.of_masks(mask, [0], [0.9]), [(200, 3, 9)])
    edge = (drawn == (200, 3, 9)).all(axis=2)
    expected = mask[0].copy()
    expected[10 + width : 110 - width, left + width : left + 150 - width] = False
    assert np.array_equal(edge, expected)
    digit = np.argwhere((drawn == 255).all(axis=2))
    assert digit[:, 0].min() >= 10 and digit[:, 1].min() >= left and digit[:, 1].max() < left + 150


def test_outlines_are_left_out_at_the_border_of_the_image():
    mask = np.zeros((1, 60, 90), bool)
    mask[0, :20, :30] = True
    drawn = draw_objects(np.zeros((60, 90, 3), np.uint8), Objects.of_masks(mask, [0], [0.9]), [(200, 3, 9)])
    edge = (drawn == (200, 3, 9)).all(axis=2)
    assert edge[19, :30].all() and edge[:20, 29].all() and not edge[:19, :29].any()
