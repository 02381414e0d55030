import math

import numpy as np
import pytest
import score_making
from scipy import ndimage
from score_making import band_sizes

from dinoseg.metrics import surface as module
from dinoseg.metrics.surface import DISTANCES, boundary_errors, boundary_ious, surface_counts, surface_dices


def surface_dice(reference, prediction, tolerance):
    return float(surface_dices(reference, prediction, [True], tolerance)[0])


def boundary_iou(reference, prediction, ratio=0.02):
    """Return intersection and union of the bands of two masks."""
    masks = reference.astype(np.uint8), prediction.astype(np.uint8)
    return tuple(boundary_ious(*masks, [1], ratio)[0].tolist())


def pixel(shape, *places):
    mask = np.zeros(shape, bool)
    for place in places:
        mask[place] = True
    return mask


def blobs(seed, shape=(37, 53), threshold=0.1):
    """Return ragged patches of several pixels, some at the image's border."""
    return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2) > threshold


def id_map(seed, shape, labels=4):
    rng = np.random.default_rng(seed)
    return ndimage.gaussian_filter(rng.normal(size=(labels, *shape)), (0, 2, 2)).argmax(axis=0).astype(np.uint8)


FULL = np.ones((9, 14), bool)
EMPTY = np.zeros((9, 14), bool)
MASKS = {
    "empty": (EMPTY, EMPTY),
    "empty reference": (EMPTY, pixel((9, 14), (4, 4))),
    "empty prediction": (FULL, EMPTY),
    "full": (FULL, FULL),
    "full against one pixel": (FULL, pixel((9, 14), (4, 6))),
    "pixels 10 apart in a row": (pixel((3, 30), (1, 5)), pixel((3, 30), (1, 15))),
    "pixels 6 and 8 apart": (pixel((20, 20), (2, 3)), pixel((20, 20), (10, 9))),
    "pixels just out of reach": (pixel((20, 20), (2, 3)), pixel((20, 20), (12, 4))),
    "corners": (pixel((40, 60), (0, 0)), pixel((40, 60), (39, 59))),
    "ring and disk": (blobs(3, threshold=0.0), ndimage.binary_fill_holes(blobs(3, threshold=0.0))),
    "blobs": (blobs(0), blobs(1)),
    "thin": (blobs(5, threshold=0.45), blobs(6, threshold=0.45)),
    "noise": (np.random.default_rng(0).random((25, 31)) < 0.5, np.random.default_rng(1).random((25, 31)) < 0.05),
    "one row": (np.array([[True, False, True, True]]), np.array([[False, False, False, True]])),
    "one column": (np.array([[True], [False]]), np.array([[False], [True]])),
    "one pixel": (np.array([[True]]), np.array([[True]])),
    "far apart": (pixel((1, 400), (0, 0)), pixel((1, 400), (0, 399))),
}


@pytest.mark.parametrize("tolerance", [0, math.sqrt(2), 1.5, 9.999999999, 10.0, 1e9])
@pytest.mark.parametrize("case", MASKS)
def test_surface_dice_equals_all_pairs_of_boundary_pixels(case, tolerance):
    reference, prediction = MASKS[case]
    value = surface_dice(reference, prediction, tolerance)
    expected = score_making.surface_dice(reference, prediction, tolerance)
    assert value == (1.0 if expected is None else expected)
    assert value == surface_dice(prediction, reference, tolerance)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore")  # of the reference's own
@pytest.mark.parametrize("tolerance", [1.0, 3.0, 10.0])
def test_surface_dices_equal_monai(tolerance):
    metrics, torch = pytest.importorskip("monai.metrics"), pytest.importorskip("torch")
    for seed in range(3):
        maps = [id_map(seed, (64, 71), 6), id_map(seed + 10, (64, 71), 6)]
        one_hot = [torch.nn.functional.one_hot(torch.from_numpy(ids).long(), 6).permute(2, 0, 1)[None] for ids in maps]
        theirs = metrics.compute_surface_dice(one_hot[1], one_hot[0], [tolerance] * 6, include_background=True)
        ours = surface_dices(*maps, range(6), tolerance)
        np.testing.assert_allclose(ours, theirs[0].numpy(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.int64])
def test_any_integer_type_counts_the_same(dtype):
    reference, prediction = id_map(2, (22, 27)), id_map(3, (22, 27))
    ours = [ids.astype(dtype) for ids in (reference, prediction)]
    assert (surface_counts(*ours, range(4), 2) == surface_counts(reference, prediction, range(4), 2)).all()
    assert (boundary_ious(*ours, range(4)) == boundary_ious(reference, prediction, range(4))).all()


@pytest.mark.parametrize("ratio", [0.001, 0.02, 0.3])
@pytest.mark.parametrize("case", MASKS)
def test_boundary_iou_equals_repeated_erosion(case, ratio):
    assert boundary_iou(*MASKS[case], ratio) == band_sizes(*MASKS[case], ratio)


@pytest.mark.parametrize("shape", [(60, 80), (121, 50), (7, 300)])
def test_boundary_ious_of_a_map_equal_those_of_its_masks(shape):
    reference, prediction = id_map(6, shape), id_map(7, shape)
    prediction[prediction == 3] = 8
    together = boundary_ious(reference, prediction, [0, 1, 2, 3, 8, 9])
    alone = [boundary_iou(reference == label, prediction == label) for label in (0, 1, 2, 3, 8, 9)]
    assert together.dtype == np.int64 and together.tolist() == [list(pair) for pair in alone]
    assert together[5].tolist() == [0, 0] and together[4, 0] == 0 < together[4, 1]


def loop_bands(mask, prediction, ignore_index):
    """The same by a loop over pixels."""
    height, width = mask.shape
    edge = []
    for y in range(height):
        for x in range(width):
            around = [(y + dy, x + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
            around = [mask[p] for p in around if 0 <= p[0] < height and 0 <= p[1] < width]
            if mask[y, x] != ignore_index and any(other not in (mask[y, x], ignore_index) for other in around):
                edge.append((y, x))
    counts = np.zeros((len(DISTANCES) + 1, 2), int)
    for y in range(height):
        for x in range(width):
            if mask[y, x] == ignore_index:
                continue
            nearest = min(((y - v) ** 2 + (x - u) ** 2 for v, u in edge), default=10**9)
            band = next((place for place, end in enumerate(DISTANCES) if nearest < end**2), len(DISTANCES))
            counts[band] += (1, mask[y, x] != prediction[y, x])
    return counts


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (24, 31), (40, 3)], ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.2, 1.0])
def test_bands_are_those_of_a_loop_over_pixels(size, ignored):
    draw = np.random.default_rng(int(10 * ignored) + size[0])
    blocks = np.kron(draw.integers(0, 3, (4, 4)), np.ones((10, 10), int))[: size[0], : size[1]].astype(np.uint8)
    is_ignored = draw.random(size) < ignored / 4 if ignored < 1 else np.ones(size, bool)
    mask = np.where(is_ignored, 255, blocks).astype(np.uint8)
    prediction = draw.integers(0, 3, size).astype(np.uint8)
    assert np.array_equal(boundary_errors(mask, prediction, 255), loop_bands(mask, prediction, 255))


def test_an_image_in_parts_gives_the_same(monkeypatch):
    draw = np.random.default_rng(0)
    mask = np.kron(draw.integers(0, 3, (5, 4)), np.ones((20, 20), int)).astype(np.uint8)
    prediction = draw.integers(0, 3, mask.shape).astype(np.uint8)
    whole = boundary_errors(mask, prediction, 255)
    monkeypatch.setattr(module, "_BAND_ROWS", 7)
    assert np.array_equal(boundary_errors(mask, prediction, 255), whole)
