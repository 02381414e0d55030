from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dinoseg.core.contracts import Backbone
from dinoseg.tracking.propagation.features import last_maps, resize
from dinoseg.tracking.propagation.settings import DINO, PropagationSettings
from dinoseg.tracking.provenance import precision_of
from dinoseg.tracking.tracker import common_size
from dinoseg.utils.errors import UserError

CPU = torch.device("cpu")


class Patches(Backbone):
    patch_size = 4

    def forward(self, images):
        self.half = torch.is_autocast_enabled("cpu")
        return [images, F.avg_pool2d(images, 4)]


@pytest.mark.parametrize(
    "settings", [PropagationSettings(short_side=16), PropagationSettings(short_side=None, resample="bilinear"), DINO]
)
def test_the_last_map_of_resized_frames(settings):
    frames = list(np.random.default_rng(0).integers(0, 256, (3, 18, 30, 3)).astype(np.uint8))
    size = {16: (16, 28), None: (20, 32), 480: (480, 768)}[settings.short_side]
    found = last_maps(Patches(), frames, settings, CPU, nullcontext)
    for frame, maps in zip(frames, found, strict=True):
        pixels = resize(frame, size, settings.resample).astype(np.float64) / 255
        cells = pixels.reshape(size[0] // 4, 4, size[1] // 4, 4, 3).mean((1, 3)).transpose(2, 0, 1)
        np.testing.assert_allclose(maps, cells, atol=1e-6)


def test_the_precision_is_that_of_the_forward_pass():
    def half():
        return torch.autocast("cpu", torch.bfloat16)

    assert precision_of(nullcontext, CPU) == "float32" and precision_of(half, CPU) == "bfloat16"
    backbone = Patches()
    for autocast in (nullcontext, half):
        last_maps(backbone, [np.zeros((8, 8, 3), np.uint8)], PropagationSettings(short_side=8), CPU, autocast)
        assert backbone.half == (autocast is half)


def test_one_size_of_a_video():
    frame, mask = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint8)
    assert common_size(None, [frame, frame], [mask, None]) == (4, 6) == common_size((4, 6), [frame])
    for size, frames, masks, message in (
        (None, [frame, frame[:3]], (), "A frame is 3 x 6 pixels, but the first frame 4 x 6"),
        ((5, 6), [frame], (), "A frame is 4 x 6 pixels, but the first frame 5 x 6"),
        (None, [frame], [mask[:, :5]], "A mask is 4 x 5 pixels"),
        (None, [frame], [frame], "A mask is 4 x 6 x 3 pixels"),
    ):
        with pytest.raises(UserError, match=message):
            common_size(size, frames, masks)
