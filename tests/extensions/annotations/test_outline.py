"""Shapes of annotations and the outlines of masks, against pycocotools and LabelMe."""

import tracemalloc
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco

from dinoseg.core.objects import RunLengths
from dinoseg.extensions.annotations import rle
from dinoseg.extensions.annotations.drawing import Box, CompressedColumns, Drawing, Figure, Polygons
from dinoseg.extensions.annotations.polygon import check_polygon, draw_figure, rasterise
from dinoseg.extensions.annotations.written_files import PredictedShapes, edge_polygons, middle_polygons
from dinoseg.inference.outputs import ImagePrediction

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own


def pictures():
    """Yield class ids: noise, blobs with holes, single pixels, rings in rings, what touches the edges."""
    draw = np.random.default_rng(0)
    for size in ((1, 1), (1, 9), (8, 1), (7, 9), (40, 31)):
        yield draw.integers(0, 3, size).astype(np.uint8)
    for sigma in (1, 2, 4):
        blobs = cv2.GaussianBlur(draw.standard_normal((60, 80)), (0, 0), sigma) * sigma * 4 + 1
        yield blobs.clip(0, 2).astype(np.uint8)
    rings = np.zeros((41, 41), np.uint8)
    for radius in (18, 15, 11, 8, 4, 2):
        cv2.circle(rings, (20, 20), radius, 1 - int(rings[20, 20]), -1)
    yield rings
    rings[20, :] = 1
    yield rings.T.copy()


def draw_polygons(polygons, shape, by_middles):
    canvas = np.zeros(shape, bool)
    for points in polygons:
        if by_middles:
            patch = draw_figure("polygon", [(float(x), float(y)) for x, y in points], shape)
        else:
            patch = rasterise(points.astype(float), shape)
        patch.view(canvas)[patch.mask] = True
    return canvas


def find_parts(ids, background=None, **options):
    prediction = ImagePrediction("a", Path("a.png"), np.zeros((*ids.shape, 3), np.uint8), ids, None)
    return list(PredictedShapes(**options).parts(prediction, background))


@pytest.mark.parametrize("objects", ["component", "class"])
def test_parts_become_polygons_and_pixels_again(objects):
    seen = 0
    for ids in pictures():
        rest = ids.astype(int)
        for part in find_parts(ids, objects=objects):
            whole = np.zeros(ids.shape, bool)
            left, top, width, height = part.box
            whole[top : top + height, left : left + width] = part.mask
            assert (rest[whole] == part.class_id).all()  # each pixel is in one part
            rest[whole] = -1
            np.testing.assert_array_equal(part.runs.to_mask(ids.shape), whole)
            for by_middles, polygons in ((False, edge_polygons), (True, middle_polygons)):
                again = draw_polygons(polygons(part, 0), ids.shape, by_middles)
                np.testing.assert_array_equal(again, whole, err_msg=f"{by_middles} {ids.shape}")
            seen += 1
        assert (rest == -1).all()
    assert seen >= 25


def test_pixels_that_touch_at_corners_are_one_part():
    corners = np.eye(3, dtype=np.uint8)
    for objects in ("component", "class"):
        assert [part.mask.sum() for part in find_parts(corners, 0, objects=objects, min_area=3)] == [3]


def random_polygons(count):
    """Yield an image size and a polygon (N, 2), often partly or wholly outside of the image."""
    rng = np.random.default_rng(0)
    for number in range(count):
        points = rng.normal(rng.uniform(-50, 120, 2), rng.choice([5, 30, 100, 1000]), (rng.integers(3, 12), 2))
        points = [points.round(), points.round(1), np.round(points * 5) / 5, np.repeat(points, 2, axis=0)][number % 4]
        if number % 7 == 0:
            points[1] = points[0] + rng.integers(-3, 4, 2)
        if number % 11 == 0:
            points[:, 0] = points[0, 0]
        yield (int(rng.integers(1, 90)), int(rng.integers(1, 90))), points
    angles = np.linspace(0, 2 * np.pi, 3000, endpoint=False)
    yield (80, 80), 40 + (30 + 8 * np.sin(9 * angles))[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_polygons_are_filled_as_pycocotools_fills_them():
    outside = covered = 0
    for size, points in random_polygons(500):
        whole = coco.decode(coco.frPyObjects([points.ravel().tolist()], *size))[..., 0].astype(bool)
        np.testing.assert_array_equal(draw_polygons([points], size, by_middles=False), whole)
        outside += bool((points < 0).any() or (points > size[::-1]).any())
        covered += whole.any()
    assert outside > 300 and covered > 150 and whole.any() and not whole.all()


def test_a_polygon_far_outside_costs_no_memory():
    points = np.array([(-4e5, -2e5), (4e5, -2e5), (30.0, 100)])
    check_polygon(points)
    tracemalloc.start()
    try:
        mask = rasterise(points, (64, 64)).mask
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert mask.all() and peak < 2**20


def masks():
    draw = np.random.default_rng(0)
    for size in ((1, 1), (1, 7), (9, 1), (5, 6), (33, 47), (120, 81)):
        for share in (0, 0.02, 0.5, 0.98, 1):
            yield draw.random(size) < share
    solid = np.zeros((700, 900), bool)
    solid[3:650, 4:870] = True
    yield solid


def test_run_lengths_are_those_of_pycocotools():
    for mask in masks():
        text = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        counts = RunLengths.of_mask(mask).to_counts(mask.size)
        assert rle.to_text(counts) == text
        np.testing.assert_array_equal(rle.from_text(text), counts)
        again = RunLengths.of_counts(rle.parse_counts(text, mask.size))
        np.testing.assert_array_equal(again.to_mask(mask.shape), mask)
        listed = coco.frPyObjects({"counts": counts.tolist(), "size": list(mask.shape)}, *mask.shape)
        assert listed["counts"].decode() == text


def test_texts_are_parsed_together_as_one_by_one():
    draw = np.random.default_rng(1)
    for size in (1, 30, 3000):
        shares = [*draw.random(9), 0, 1]
        counts = [RunLengths.of_mask(draw.random((size, 1)) < share).to_counts(size) for share in shares]
        texts = [rle.to_text(each) for each in counts]
        for number in range(1, len(texts) + 1):
            for expected, found in zip(counts, rle.parse_texts(texts[:number], size), strict=False):
                np.testing.assert_array_equal(found, expected)
        assert rle.parse_texts(texts, size + 1) is None
    assert rle.parse_texts([], 30) is None
    faults = ["0\x7f", "0é", "P", "o" * 8 + "0", "oooooo0", "N", "0" * 218, "", "o0o0", "n0m0"]
    for place, fault in product(range(3), faults):
        good = [rle.to_text(np.array([3, 20, 7]))] * 3
        with pytest.raises(ValueError):
            rle.parse_counts(fault, 30)
        assert rle.parse_texts([*good[:place], fault, *good[place:]], 30) is None


def test_shapes_of_one_image_are_painted_in_order(tmp_path):
    ring = np.array([[1, 1], [5, 1], [5, 4], [1, 4.0]]).tobytes()
    hole = np.array([0, 4, 1, 4]).tobytes()
    column = CompressedColumns(rle.to_text(np.array([4, 1, 25])))
    shapes = [(1, Polygons((ring,))), (2, Box((-1, 3, 3, 3), hole)), (3, column)]
    contents = ((9, shapes), (8, shapes), (9, shapes[:2]))
    drawing, *others = (Drawing(tmp_path / "x.json", "x", (5, 6), *content) for content in contents)
    expected = [
        [9, 9, 9, 9, 9, 9],
        [9, 1, 1, 1, 1, 9],
        [9, 1, 1, 1, 1, 9],
        [2, 2, 1, 1, 1, 9],
        [3, 2, 9, 9, 9, 9],
    ]
    np.testing.assert_array_equal(drawing.read(), expected)
    assert len({drawing.digest(), *(other.digest() for other in others)}) == 3


def test_figures_are_those_of_labelme():
    assert draw_figure("rectangle", [(4, 3), (1, 1)], (6, 6)).mask.sum() == 12  # both ends are in
    circle = draw_figure("circle", [(10, 10), (10, 14)], (21, 21)).mask
    assert circle.sum() == pytest.approx(np.pi * 4.5**2, rel=0.1)
    assert draw_figure("point", [(10, 10)], (21, 21)).mask.any(axis=0).sum() == 11
    assert draw_figure("line", [(0, 10), (20, 10)], (21, 21)).mask.any(axis=1).sum() == 10
    canvas = np.zeros((6, 6), np.uint8)
    Figure("polygon", np.array([[1, 1], [4, 1], [4, 3], [1, 3.0]]).tobytes()).paint(canvas, 7)
    assert (canvas == 7).sum() == 12 and (canvas[1:4, 1:5] == 7).all()


@pytest.mark.parametrize(
    ("counts", "wrong"),
    [
        ("0\x7f", "invalid characters"), ("0é", "invalid characters"), ("P", "are truncated"),
        ("o" * 8 + "0", "too large"),
        ("oooooo0", "each must be from 0 to 30"),
        ([10, -1, 21], "each must be"), ("N", "each must be"), ([30, 1], "add up to 31"), ([], "add up to 0"),
        ("0" * 218, "more than a mask of 30"),
        ([10**30, -(10**30)], "whole numbers"), ([True, 29], "whole numbers"), (None, "whole numbers"), ("", "add up"),
    ],
)  # fmt: skip
def test_invalid_run_lengths_are_refused(counts, wrong):
    with pytest.raises(ValueError, match=wrong):
        rle.parse_counts(counts, 30)


@pytest.mark.parametrize(
    ("points", "wrong"),
    [
        ([[0, 0], [1, 1]], "needs at least 3"), ([[0, 0], [1, 1], [np.nan, 2]], "not a number"),
        ([[0, 0], [1, 1], [1e30, 2]], "away"), ([[0, 0], [1, 1], [1_000_001, 2]], "away"),
        ([[0, 0], [1e6, 1e6]] * 10, "crosses the image many times"),
    ],
)  # fmt: skip
def test_invalid_polygons_are_refused(points, wrong):
    with pytest.raises(ValueError, match=wrong):
        check_polygon(np.array(points, float))
