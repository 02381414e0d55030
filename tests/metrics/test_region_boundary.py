from itertools import permutations

import numpy as np
import pytest
from official_davis import official_pairs, official_statistics

from dinoseg.metrics.region_boundary import boundary_radius, match_proposals, object_scores, pair_scores, statistics


def blobs(rng, size, count, least=2):
    """Overlapping rectangles and ellipses of ids 1..count, the later over the earlier."""
    ids = np.zeros(size, np.uint8)
    y, x = np.mgrid[: size[0], : size[1]]
    for label in range(1, count + 1):
        centre = rng.uniform((0, 0), size)
        half = rng.uniform(least, np.maximum(size, 4 * least)) / 3
        inside = np.abs([y - centre[0], x - centre[1]]) / half[:, None, None]
        ids[(inside.max(axis=0) < 1) if label % 2 else ((inside**2).sum(axis=0) < 1)] = label
    return ids


def flat(value, size=(20, 30)):
    return np.full(size, value, np.uint8)


def pixel(row, column, size=(20, 30)):
    ids = flat(0, size)
    ids[row, column] = 1
    return ids


def cases():
    rng = np.random.default_rng(3)

    def noise(size, count):
        return rng.integers(0, count + 1, size, dtype=np.uint8)

    yield "blobs", blobs(rng, (90, 124), 4), blobs(rng, (90, 124), 6), 4, 6
    moved = blobs(rng, (200, 300), 5)
    yield "moved by the radius", moved, np.roll(moved, (2, -3), (0, 1)), 5, 5
    yield "radius 4", blobs(rng, (240, 320), 3, 20), blobs(rng, (240, 320), 3, 20), 3, 3
    yield "more than a byte of masks", blobs(rng, (60, 80), 17), blobs(rng, (60, 80), 20), 17, 20
    yield "noise", noise((33, 47), 9), noise((33, 47), 8), 9, 8
    yield "more edges than are counted at once", noise((290, 300), 2), noise((290, 300), 2), 2, 2
    yield "many objects", noise((40, 30), 60), noise((40, 30), 3), 60, 3
    yield "absent ids on both sides", noise((20, 20), 2) * 3, noise((20, 20), 1) * 5, 7, 6
    yield "ids beyond the masks", noise((20, 20), 9), noise((20, 20), 9), 3, 2
    yield "empty both", flat(0), flat(0), 2, 3
    yield "full both", flat(1), flat(1), 1, 2
    yield "full and empty", flat(1), flat(0), 1, 1
    yield "full and one pixel", flat(1), pixel(7, 7), 1, 1
    yield "empty and one pixel", flat(0), pixel(7, 7), 1, 1
    for corner in ((0, 0), (0, 29), (19, 0), (19, 29)):
        yield f"pixel at {corner}", pixel(*corner), pixel(10, 10), 1, 1
        yield f"pixels at {corner}", pixel(*corner), pixel(*corner), 1, 1
    yield "far apart", pixel(3, 3), pixel(15, 25), 1, 1
    for size in ((1, 1), (1, 50), (50, 1), (2, 3), (1, 300), (5, 7)):
        yield f"noise {size}", noise(size, 3), noise(size, 3), 3, 3
        yield f"pixel in {size}", pixel(0, 0, size), pixel(-1, -1, size), 1, 1
    yield "no objects", noise((9, 9), 2), noise((9, 9), 2), 0, 2
    yield "no proposals", noise((9, 9), 2), noise((9, 9), 2), 2, 0
    yield "tolerance of 1 pixel exactly", blobs(rng, (75, 100), 3), blobs(rng, (75, 100), 3), 3, 3


CASES = {name: rest for name, *rest in cases()}


@pytest.mark.parametrize(
    ("case", "voids"), [*((case, ("none", "some")[index % 2]) for index, case in enumerate(CASES)), ("blobs", "all")]
)
def test_all_pairs_equal_the_official_way_to_the_last_bit(case, voids):
    reference, prediction, objects, proposals = CASES[case]
    share = {"none": 0.0, "some": 0.2, "all": 1.1}[voids]
    void = np.random.default_rng(5).random(reference.shape) < share
    region, boundary = pair_scores(reference, prediction, objects, proposals, void)
    expected = official_pairs(reference, prediction, objects, proposals, void)
    assert region.shape == boundary.shape == (proposals, objects)
    assert np.array_equal(region, expected[0])
    assert np.array_equal(boundary, expected[1])
    if voids == "none":
        without = pair_scores(reference, prediction, objects, proposals)
        assert np.array_equal(np.stack(without), expected)
    same = range(min(objects, proposals))
    assert np.array_equal(object_scores(reference, prediction, len(same), void), expected[:, same, same])


@pytest.mark.parametrize("size", [(60, 350), (60, 600), (60, 980), (30, 2500), (2500, 30), (9, 8190), (3, 9000)])
def test_large_radii(size):
    rng = np.random.default_rng(size[0])
    maps = ((rng.random((2, *size)) < 0.0004) + 2 * (rng.random((2, *size)) < 0.0001)).astype(np.uint8)
    assert boundary_radius(size) > (19 if max(size) > 1000 else 2)
    assert np.array_equal(pair_scores(*maps, 3, 3), official_pairs(*maps, 3, 3))


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int64])
def test_any_integer_type_holds_ids(dtype):
    rng = np.random.default_rng(0)
    maps = rng.integers(-2, 5, (2, 31, 22)).astype(dtype)
    maps[0, 0, :5] = [256, 257, 300, 258, 3]  # 256 + 1 is no object 1
    expected = official_pairs(*maps, 3, 4)
    assert np.array_equal(np.stack(pair_scores(*maps, 3, 4)), expected)


def test_the_most_masks_there_can_be_are_scored_unchanged():
    maps = np.random.default_rng(0).integers(0, 256, (2, 12, 15)).astype(np.uint8)
    maps[1] //= 30
    before = maps.copy()
    found = pair_scores(*maps, 255, 8)
    expected = official_pairs(*maps, 255, 8)
    assert np.array_equal(np.stack(found), expected) and np.array_equal(maps, before)


@pytest.mark.parametrize("length", [*range(1, 24), 67, 100, 255])
def test_statistics_equal_the_official_ones(length):
    rng = np.random.default_rng(length)
    values = rng.choice([0.0, 0.5, 1.0, 0.25, rng.random()], (2, 3, length))
    found = statistics(values)
    for index in np.ndindex(2, 3):
        assert found[index] == pytest.approx(official_statistics(values[index], np.uint8), abs=1e-15, nan_ok=True)


def test_statistics_of_nan_frames_and_of_none():
    rng = np.random.default_rng(1)
    values = np.where(rng.random((40, 11)) < 0.4, np.nan, rng.random((40, 11)))
    values[0], values[1, :5] = np.nan, np.nan
    for row, found in zip(values, statistics(values), strict=True):
        assert found == pytest.approx(official_statistics(row), abs=1e-15, nan_ok=True)
    assert statistics(np.array([np.nan, np.nan])) == pytest.approx([np.nan, 0.0, np.nan], nan_ok=True)
    assert np.isnan(statistics(np.zeros((2, 0)))).all() and statistics(np.zeros((0, 5))).shape == (0, 3)


@pytest.mark.parametrize("length", [256, 257, 700])
def test_the_decay_of_long_sequences_is_the_defined_one(length):
    values = np.linspace(1, 0, length)
    quarter = round(1 + (length - 1) / 4)
    assert statistics(values)[2] == pytest.approx(values[:quarter].mean() - values[::-1][:quarter].mean(), abs=0.01)
    assert statistics(values) == pytest.approx(official_statistics(values), abs=1e-15)
    if length > 256:  # there numpy 1, which promotes by value, still gets it right
        assert not statistics(values)[2] == pytest.approx(official_statistics(values, np.uint8)[2], abs=1e-3)


@pytest.mark.parametrize(("proposals", "objects"), [(1, 1), (3, 3), (5, 3), (6, 1), (4, 0)])
def test_proposals_are_matched_where_the_total_is_greatest(proposals, objects):
    rng = np.random.default_rng(proposals)
    region, boundary = rng.random((2, proposals, objects, 4))
    match = match_proposals(region, boundary)
    quality = (region + boundary).mean(axis=2)
    totals = {
        chosen: sum(quality[one, index] for index, one in enumerate(chosen))
        for chosen in permutations(range(proposals), objects)
    }
    assert tuple(match.tolist()) == max(totals, key=totals.get)
