from contextlib import nullcontext

import numpy as np
import pytest
import torch

from dinoseg.core.shapes import Prediction
from dinoseg.inference.predictor import Predictor
from dinoseg.inference.video_run import FrameClasses


class Marked(torch.nn.Module):
    """Scores that are the pixels; keeps the first pixel of every image, by which it is known."""

    def __init__(self):
        super().__init__()
        self.run_bands = []

    def forward(self, images):
        self.run_bands += images[:, 0, 0, 0].tolist()
        return Prediction(images / 32.0, images.shape[-2:], (1.0, 1.0), lambda outputs, size, valid: outputs)


def reference(frames, skip, smooth):
    """Return class ids and probabilities in float64, a frame at a time."""
    mean, shown = None, []
    for number, frame in enumerate(frames):
        if number % skip == 0:
            scores = np.exp(frame.astype(np.float64) / 32.0)
            shares = scores / scores.sum(axis=-1, keepdims=True)
            mean = shares if mean is None else smooth * mean + (1 - smooth) * shares
        shown.append(mean)
    return [shares.argmax(axis=-1) for shares in shown], shown


@pytest.mark.parametrize("count", [1, 2, 5, 11])
@pytest.mark.parametrize("skip", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("smooth", [0.0, 0.3, 0.9])
def test_frames_and_averages_are_those_of_a_loop_of_ones_own(count, skip, smooth):
    draw = np.random.default_rng(count * skip)
    frames = draw.permuted(np.tile(np.arange(0, 255, 5, np.uint8), (count, 48, 1)), axis=2)[..., :3].reshape(
        -1, 6, 8, 3
    )
    frames[:, 0, 0] = [(number, 100, 200) for number in range(count)]
    ids, shares = reference(frames, skip, smooth)
    for batch in (1, 3, 4):
        for kept in (False, True):
            model = Marked().eval()
            predictor = Predictor(model, torch.device("cpu"), nullcontext)
            classes = FrameClasses(predictor, skip=skip, smooth=smooth, probabilities=kept)
            seen = [shown for at in range(0, count, batch) for shown in classes.of(list(frames[at : at + batch]))]
            assert model.run_bands == list(range(0, count, skip))
            assert len(seen) == count and all((shown.probabilities is not None) == kept for shown in seen)
            for number, shown in enumerate(seen):
                close = np.sort(shares[number], axis=-1)
                sure = close[..., -1] - close[..., -2] > 1e-5
                assert sure.mean() > 0.9 and np.array_equal(shown.ids[sure], ids[number][sure])
                if kept:
                    np.testing.assert_allclose(shown.probabilities.permute(1, 2, 0), shares[number], atol=1e-6)
