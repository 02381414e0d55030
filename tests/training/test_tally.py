"""How a training step predicts its own batches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dinoseg.core.shapes import Batch, Prediction
from dinoseg.metrics.confusion import ConfusionMatrix
from dinoseg.training.engine import Engine
from dinoseg.training.tally import Tally, _centres, _subsample
from dinoseg.utils.errors import UserError


class Data:
    classes, ignore_index = ("a", "b", "c"), 255


@pytest.fixture(scope="module")
def engine():
    return Engine("cpu", "fp32", workers=0)


def prediction_and_batch(scores, mask):
    def to_pixels(outputs, size, valid):
        return torch.nn.functional.interpolate(outputs, size, mode="bilinear")

    batch = Batch(torch.zeros(len(mask), 3, *mask.shape[1:], dtype=torch.uint8), mask, ["x"] * len(mask))
    return Prediction(scores, tuple(mask.shape[1:]), (1.0, 1.0), to_pixels), batch


def test_small_images_are_counted_whole(engine):
    draw = torch.Generator().manual_seed(0)
    tally, whole = Tally(Data, engine), ConfusionMatrix(3)
    for _ in range(2):
        scores = torch.randn(2, 3, 19, 23, generator=draw, requires_grad=True)
        mask = torch.randint(0, 3, (2, 19, 23), generator=draw).to(torch.uint8)
        mask[:, :3] = 255
        tally.add(*prediction_and_batch(scores, mask))
        whole.update(scores.argmax(dim=1), mask)
    expected = whole.compute()
    assert tally.read() == {"train/accuracy": expected["accuracy"], "train/miou": expected["miou"]}


def test_large_images_are_counted_at_sampled_points(engine):
    mask = torch.zeros(1, 540, 957, dtype=torch.uint8)
    mask[:, 200:, 300:] = 1
    scores = torch.nn.functional.one_hot(mask.long(), 3).permute(0, 3, 1, 2).float()
    tally = Tally(Data, engine)
    tally.add(*prediction_and_batch(scores, mask))
    counted = tally._counts.compute()
    assert 0.9 * 128**2 < counted["pixels"] <= 1.03 * 128**2
    assert counted["accuracy"] > 0.995 and np.isclose(
        counted["classes"][1]["pixels"] / counted["pixels"], mask.float().mean(), atol=0.01
    )
    assert _subsample(mask).shape == (1, 97, 171)
    assert _centres(10, 5, torch.device("cpu")).tolist() == [1, 3, 5, 7, 9]


def test_empty_tally_has_no_scores(engine):
    tally = Tally(Data, engine)
    tally.add(*prediction_and_batch(torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), 255, dtype=torch.uint8)))
    assert tally.read() == {"train/accuracy": None, "train/miou": None}


def test_prediction_of_an_unknown_class_is_an_error(engine):
    with pytest.raises(UserError, match="found: .7."):
        Tally(Data, engine).add(
            *prediction_and_batch(torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), 7, dtype=torch.uint8))
        )


def test_tally_sums_over_ranks_and_omits_the_ignored_id():
    class Other(Data):
        ignore_index = 2

    wrong = ConfusionMatrix(3, ignore_index=2)
    wrong.update(torch.ones(1, 1, 8, dtype=torch.uint8), torch.zeros(1, 1, 8, dtype=torch.uint8))
    tally = Tally(Other, SimpleNamespace(device="cpu", sum=lambda counts: counts + wrong.counts))
    mask = torch.zeros(1, 4, 4, dtype=torch.uint8)
    mask[:, 2:] = 2
    scores = torch.zeros(1, 3, 4, 4)
    scores[:, 0] = 1
    tally.add(*prediction_and_batch(scores, mask))
    assert tally.read() == {"train/accuracy": 0.5, "train/miou": 0.25}
