import numpy as np
import pytest

from dinoseg.metrics import boundary_errors as module
from dinoseg.metrics.boundary_errors import DISTANCES, boundary_errors


def reference(mask, prediction, ignore_index):
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
    mask = np.where(draw.random(size) < ignored / 4 if ignored < 1 else np.ones(size, bool), 255, blocks).astype(
        np.uint8
    )
    prediction = draw.integers(0, 3, size).astype(np.uint8)
    assert np.array_equal(boundary_errors(mask, prediction, 255), reference(mask, prediction, 255))


def test_an_image_in_parts_gives_the_same(monkeypatch):
    draw = np.random.default_rng(0)
    mask = np.kron(draw.integers(0, 3, (5, 4)), np.ones((20, 20), int)).astype(np.uint8)
    prediction = draw.integers(0, 3, mask.shape).astype(np.uint8)
    whole = boundary_errors(mask, prediction, 255)
    monkeypatch.setattr(module, "_ROWS", 7)
    assert np.array_equal(boundary_errors(mask, prediction, 255), whole)
