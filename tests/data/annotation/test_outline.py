import tracemalloc

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco

from dinoseg.data.annotation.polygon import check_polygon, figure, rasterise
from dinoseg.data.annotation.rle import counts_of
from dinoseg.inference.annotations import edge_polygons, middle_polygons, parts_of


def pictures():
    """Yield class ids: noise, blobs with holes, single pixels, rings in rings, what touches the edges."""
    draw = np.random.default_rng(0)
    for size in ((1, 1), (1, 9), (8, 1), (7, 9), (40, 31)):
        yield draw.integers(0, 3, size).astype(np.uint8)
    for sigma in (1, 2, 4):
        yield (
            (cv2.GaussianBlur(draw.standard_normal((90, 120)), (0, 0), sigma) * sigma * 4 + 1)
            .clip(0, 2)
            .astype(np.uint8)
        )
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
            canvas |= figure("polygon", [(float(x), float(y)) for x, y in points], shape)
        else:
            left, mask = rasterise(points.astype(float), shape)
            canvas[:, left : left + mask.shape[1]] |= mask
    return canvas


@pytest.mark.parametrize("joined", [False, True])
def test_parts_become_polygons_and_pixels_again(joined):
    seen = 0
    for ids in pictures():
        for part in parts_of(ids, leave_out=None, joined=joined, min_area=1):
            whole = np.zeros(ids.shape, bool)
            height, width = part.mask.shape
            whole[part.top : part.top + height, part.left : part.left + width] = part.mask
            np.testing.assert_array_equal(part.counts(*ids.shape), counts_of(whole.T.ravel()))
            for by_middles, polygons in ((False, edge_polygons), (True, middle_polygons)):
                again = draw_polygons(polygons(part, 0), ids.shape, by_middles)
                np.testing.assert_array_equal(again, whole, err_msg=f"{by_middles} {ids.shape}")
            seen += 1
    assert seen >= 25


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
def test_pycocotools_reads_the_polygons_to_the_pixel():
    ids = list(pictures())[6]
    again = np.zeros_like(ids)
    for part in parts_of(ids, leave_out=0, joined=False, min_area=1):
        rings = [points.ravel().astype(float).tolist() for points in edge_polygons(part, 0)]
        again[coco.decode(coco.merge(coco.frPyObjects(rings, *ids.shape))).astype(bool)] = part.value
    np.testing.assert_array_equal(again, ids)


def test_all_parts_together_equal_the_image():
    for ids in pictures():
        parts = list(parts_of(ids, leave_out=0, joined=False, min_area=1))
        assert sum(int(part.mask.sum()) for part in parts) == (ids > 0).sum()
        large = list(parts_of(ids, leave_out=0, joined=False, min_area=5))
        assert {part.value for part in large} <= {1, 2} and all(part.mask.sum() >= 5 for part in large)


def test_pixels_touching_at_corners_form_one_part():
    corners = np.eye(3, dtype=np.uint8)
    assert [part.mask.sum() for part in parts_of(corners, leave_out=0, joined=False, min_area=3)] == [3]
    assert [part.mask.sum() for part in parts_of(corners, leave_out=0, joined=True, min_area=3)] == [3]


def test_a_tolerance_leaves_points_out_and_moves_little():
    ids = list(pictures())[7]
    (exact, few), scores = (
        (
            [list(edge_polygons(part, t)) for part in parts_of(ids, leave_out=0, joined=True, min_area=1)]
            for t in (0, 1)
        ),
        [],
    )
    for one, other in zip(exact, few, strict=True):
        assert sum(map(len, other)) < 0.6 * sum(map(len, one))
        before, after = draw_polygons(one, ids.shape, False), draw_polygons(other, ids.shape, False)
        scores.append((before & after).sum() / (before | after).sum())
    assert min(scores) > 0.85


def random_polygons(count):
    """Yield an image size and a polygon (N, 2), often partly or wholly outside of the image."""
    rng = np.random.default_rng(0)
    for number in range(count):
        points = rng.normal(rng.uniform(-50, 120, 2), rng.choice([5, 30, 100, 1000]), (rng.integers(3, 12), 2))
        if number % 3 == 0:
            points = np.round(points)
        if number % 3 == 1:
            points = np.round(points * 5) / 5
        if number % 7 == 0:
            points[1] = points[0] + rng.integers(-3, 4, 2)
        if number % 11 == 0:
            points[:, 0] = points[0, 0]
        yield (int(rng.integers(1, 90)), int(rng.integers(1, 90))), points


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
def test_polygons_partly_outside_are_those_of_pycocotools():
    outside = covered = 0
    for size, points in random_polygons(500):
        whole = coco.decode(coco.frPyObjects([points.ravel().tolist()], *size))[..., 0].astype(bool)
        np.testing.assert_array_equal(draw_polygons([points], size, by_middles=False), whole)
        outside += bool((points < 0).any() or (points > size[::-1]).any())
        covered += whole.any()
    assert outside > 300 and covered > 150


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own
def test_polygons_of_thousands_of_points_are_filled_exactly():
    angles = np.linspace(0, 2 * np.pi, 3000, endpoint=False)
    radii = 30 + 8 * np.sin(9 * angles)
    points = np.stack([40 + radii * np.cos(angles), 40 + radii * np.sin(angles)], axis=1)
    whole = coco.decode(coco.frPyObjects([points.ravel().tolist()], 80, 80))[..., 0].astype(bool)
    np.testing.assert_array_equal(draw_polygons([points], (80, 80), by_middles=False), whole)
    assert whole.any() and not whole.all()


def test_a_polygon_far_outside_costs_no_memory():
    points = np.array([(-4e5, -2e5), (4e5, -2e5), (30.0, 100)])
    check_polygon(points)
    tracemalloc.start()
    try:
        _, mask = rasterise(points, (64, 64))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert mask.all() and peak < 2**20
