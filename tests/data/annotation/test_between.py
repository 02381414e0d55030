import numpy as np
import pytest

from dinoseg.data.annotation.between import Outline, between

SQUARE = [(0, 0), (8, 0), (8, 8), (0, 8)]


def outline(kind, numbers, turned=0):
    return Outline(kind, np.array(numbers, float).tobytes(), turned)


@pytest.mark.parametrize(
    ("left", "right", "share", "expected"),
    [  # what CVAT's own code gives
        (SQUARE, [(4, 0), (12, 0), (12, 8), (4, 8)], 0.25, [(1, 0), (9, 0), (9, 8), (1, 8)]),
        (SQUARE, [(0, 0), (16, 0), (8, 16)], 0.5, [(0, 0), (12, 0), (8, 12), (4, 12)]),
        (
            [(0, 0), (16, 0), (8, 16)],
            [(0, 0), (8, 0), (8, 1), (8, 8), (0, 8)],
            0.5,
            [(0, 0), (12, 0), (12, 0.5), (8, 12), (4, 12)],
        ),
        ([(0, 0), (1, 0), (16, 0), (8, 16)], [(0, 0), (16, 0), (8, 16)], 0.5, [(0, 0), (0.5, 0), (16, 0), (8, 16)]),
        (  # what lies nearer than half an edge of the mean is one
            [(7, 0), (3, 5), (4, 5), (2, 3)],
            [(0, 3), (0, 3), (0, 7)],
            0.5,
            [(3.5, 1.5), (3.5, 1.5), (1.5, 6), (1, 5)],
        ),
        ([(4, 2), (2, 0), (6, 4)], [(5, 0), (7, 0), (6, 0)], 0.5, [(4.5, 1), (3.5, 0), (4.5, 0), (6, 2)]),  # a tie
    ],
)
def test_corners_of_polygons_are_matched_as_cvat_matches_them(left, right, share, expected):
    moved = between(outline("polygon", left), outline("polygon", right), share).points()
    np.testing.assert_allclose(moved, expected)


def test_a_polygon_without_extent_grows():
    moved = between(outline("polygon", [(3, 3)] * 3), outline("polygon", SQUARE), 0.5).points()
    assert {(1.5, 1.5), (5.5, 1.5), (5.5, 5.5), (1.5, 5.5)} == {*map(tuple, moved.tolist())}


def test_boxes_and_ellipses_move_in_proportion_and_turn_the_shorter_way():
    moved = between(outline("box", [0, 0, 4, 2], 350), outline("box", [8, 4, 16, 10], 30), 0.25)
    assert np.frombuffer(moved.numbers).tolist() == [2, 1, 7, 4] and moved.turned == 0
    assert between(outline("ellipse", [0, 0, 4, 2], 30), outline("ellipse", [0, 0, 8, 2], 350), 0.5).turned == 10
    assert between(outline("box", [0, 0, 4, 2]), outline("box", [0, 0, 4, 2], 180), 0.5).turned == 0.5


def test_corners_of_boxes_and_ellipses():
    assert outline("box", [2, 3, 8, 5]).points().tolist() == [[2, 3], [8, 3], [8, 5], [2, 5]]
    np.testing.assert_allclose(outline("box", [2, 3, 8, 5], 90).points(), [[6, 1], [6, 7], [4, 7], [4, 1]])
    ellipse = outline("ellipse", [5, 4, 3, 1]).points()
    assert len(ellipse) == 720 and ellipse[0].tolist() == [8, 4]
    np.testing.assert_allclose(ellipse.max(axis=0), [8, 5])
    np.testing.assert_allclose(outline("ellipse", [5, 4, 3, 1], 90).points().max(axis=0), [6, 7])
