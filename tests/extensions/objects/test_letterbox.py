"""Images that are resized to fit a square and padded with black."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from dinoseg.core.geometry import upsample, valid_share
from dinoseg.core.shapes import Prediction
from dinoseg.extensions.objects.letterbox import Letterbox
from dinoseg.inference.rows import MemoryRows

SIZES = [(30, 50), (200, 90), (64, 64), (1, 40), (7, 300)]
PATCH = 8


class PlaneModel:
    """Model whose single score is the position in its input, in pixels: 1000 times the row plus the column."""

    def __call__(self, images, *, reduce=True):
        self.seen = images
        size = (images.shape[-2], images.shape[-1])
        rows, columns = (torch.arange(-(-side // PATCH), dtype=torch.float64) * PATCH + PATCH / 2 for side in size)
        grid = (1000 * rows[:, None] + columns)[None, None]
        return Prediction(grid, size, valid_share(size, PATCH), upsample, grid=grid)


def predict(size, image):
    model = PlaneModel()
    (band,) = Letterbox(size).bands(model, MemoryRows(image[None]), nullcontext)
    return model.seen[0], band


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [40, 64, (48, 96)])
def test_pixels_equal_those_of_pillow(size, side):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen, _ = predict(side, image)
    limits = (side, side) if isinstance(side, int) else side
    factor = min(limits[0] / size[0], limits[1] / size[1])
    height, width = (max(1, round(length * factor)) for length in size)
    planes = [Image.fromarray(plane.numpy().astype(np.float32)) for plane in image]
    expected = np.stack([np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR)) for plane in planes])
    assert tuple(seen.shape) == (3, *limits)
    assert np.allclose(seen[:, :height, :width] * 255, expected, atol=1e-3)
    assert not seen[:, height:].any() and not seen[:, :, width:].any()


@pytest.mark.parametrize("size", [(30, 50), (200, 90), (64, 64), (90, 300)])
@pytest.mark.parametrize("side", [40, 60])
def test_scores_return_to_their_place_in_the_image(size, side):
    _, band = predict(side, torch.zeros(3, *size, dtype=torch.uint8))
    scores = band.scores()[0, 0]
    height, width = Letterbox(side).fit(size)
    # the centre of an image pixel in the resized image, which the padded square starts with
    rows = (torch.arange(size[0], dtype=torch.float64) + 0.5) * height / size[0]
    columns = (torch.arange(size[1], dtype=torch.float64) + 0.5) * width / size[1]
    inner = (rows > PATCH / 2) & (rows < side - PATCH / 2), (columns > PATCH / 2) & (columns < side - PATCH / 2)
    expected = 1000 * rows[:, None] + columns
    assert torch.allclose(scores[inner[0]][:, inner[1]], expected[inner[0]][:, inner[1]], rtol=0, atol=1e-6)
