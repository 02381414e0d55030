import numpy as np
import pytest
from pycocotools import mask as coco

from dinoseg.data.annotation import rle
from dinoseg.data.annotation.drawing import Box, CompressedColumns, Drawing, Figure, Polygons
from dinoseg.data.annotation.polygon import check_polygon, figure, rasterise

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own


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
        theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
        counts = rle.counts_of(mask.T.ravel())
        assert rle.to_text(counts) == theirs["counts"].decode()
        np.testing.assert_array_equal(rle.from_text(theirs["counts"].decode()), counts)
        np.testing.assert_array_equal(
            rle.decode(rle.parse_counts(theirs["counts"].decode(), mask.size), mask.shape), mask
        )
        listed = coco.frPyObjects({"counts": counts.tolist(), "size": list(mask.shape)}, *mask.shape)
        assert listed["counts"] == theirs["counts"]


def test_polygons_are_filled_as_pycocotools_fills_them():
    draw = np.random.default_rng(1)
    for number in range(400):
        size = int(draw.integers(1, 60)), int(draw.integers(1, 60))
        points = draw.uniform(-20, 80, (int(draw.integers(3, 12)), 2))
        points = [points, points.round(), points.round(1), np.repeat(points, 2, axis=0)][number % 4]
        theirs = coco.decode(coco.frPyObjects([points.ravel().tolist()], *size))[..., 0].astype(bool)
        left, part = rasterise(points, size)
        ours = np.zeros(size, bool)
        ours[:, left : left + part.shape[1]] = part
        np.testing.assert_array_equal(ours, theirs, err_msg=f"{size} {points.tolist()}")


def test_shapes_of_one_image_are_painted_in_order(tmp_path):
    ring = np.array([[1, 1], [5, 1], [5, 4], [1, 4.0]]).tobytes()
    column = np.array([4, 1, 25])
    hole = rle.counts_of(np.array([1, 1, 1, 1, 0, 1, 1, 1, 1], bool)).tobytes()
    shapes = [(1, Polygons((ring,))), (2, Box((-1, 3, 3, 3), hole)), (3, CompressedColumns(rle.to_text(column)))]
    drawing = Drawing(tmp_path / "x.json", "x", (5, 6), 9, shapes)
    expected = [
        [9, 9, 9, 9, 9, 9],
        [9, 1, 1, 1, 1, 9],
        [9, 1, 1, 1, 1, 9],
        [2, 2, 1, 1, 1, 9],
        [3, 2, 9, 9, 9, 9],
    ]
    np.testing.assert_array_equal(drawing.read(), expected)
    others = [
        Drawing(tmp_path / "x.json", "x", (5, 6), 8, shapes),
        Drawing(tmp_path / "x.json", "x", (5, 6), 9, shapes[:2]),
    ]
    assert len({drawing.digest(), *(other.digest() for other in others)}) == 3


def test_figures_are_those_of_labelme():
    assert figure("rectangle", [(4, 3), (1, 1)], (6, 6)).sum() == 12  # both ends are in
    assert figure("circle", [(10, 10), (10, 14)], (21, 21)).sum() == pytest.approx(np.pi * 4.5**2, rel=0.1)
    assert figure("point", [(10, 10)], (21, 21)).any(axis=0).sum() == 11
    assert figure("line", [(0, 10), (20, 10)], (21, 21)).any(axis=1).sum() == 10
    polygon = figure("polygon", [(1, 1), (4, 1), (4, 3), (1, 3)], (6, 6))
    assert polygon.sum() == 12 and polygon[1:4, 1:5].all()
    canvas = np.zeros((6, 6), np.uint8)
    Figure("polygon", np.array([[1, 1], [4, 1], [4, 3], [1, 3.0]]).tobytes()).paint(canvas, 7)
    np.testing.assert_array_equal(canvas == 7, polygon)


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
