import math

import pytest
import torch

from dinoseg.core.geometry import upsample, valid_share
from dinoseg.losses import points as points_module
from dinoseg.losses.points import random_points, sample_labels, sample_logits, uncertain_points


def centres(height, width):
    y, x = torch.meshgrid(
        (torch.arange(height, dtype=torch.float64) + 0.5) / height,
        (torch.arange(width, dtype=torch.float64) + 0.5) / width,
        indexing="ij",
    )
    return torch.stack([x, y], dim=-1).reshape(1, -1, 2)


@pytest.mark.parametrize("image", [(24, 32), (19, 27), (17, 8), (1, 1)])
@pytest.mark.parametrize("size", [(40, 50), (7, 5), (24, 32)])
def test_points_at_pixel_centres_equal_upsampling(image, size):
    valid = valid_share(image, 8)
    maps = torch.randn(2, 3, math.ceil(image[0] / 8), math.ceil(image[1] / 8), dtype=torch.float64)
    sampled = sample_logits(maps, centres(*size).expand(2, -1, -1), valid)
    torch.testing.assert_close(sampled.reshape(2, 3, *size), upsample(maps, size, valid), rtol=1e-10, atol=1e-10)


def test_labels_are_those_of_the_pixel_around_the_point():
    target = torch.randint(-1, 9, (3, 5, 7))
    image = torch.tensor([2, 0])
    found = sample_labels(target, image, centres(5, 7).expand(2, -1, -1))
    assert torch.equal(found.reshape(2, 5, 7), target[image])
    corners = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [0.999, 0.0], [0.15, 0.39]]])
    expected = [target[1, 0, 0], target[1, 4, 6], target[1, 0, 6], target[1, 1, 1]]
    assert sample_labels(target, torch.tensor([1]), corners)[0].tolist() == expected


def test_random_points_fill_the_image():
    torch.manual_seed(3)
    drawn = random_points(2, 4000, torch.device("cpu"))
    assert drawn.shape == (2, 4000, 2) and drawn.min() >= 0 and drawn.max() < 1
    torch.testing.assert_close(drawn.mean((0, 1)), torch.tensor([0.5, 0.5]), atol=0.02, rtol=0)


def choose(masks, target, *, valid=(1.0, 1.0), num_points=40, oversample=3.0, importance=0.75):
    options = {"num_points": num_points, "oversample": oversample, "importance": importance}
    return uncertain_points(masks, target, torch.arange(len(masks)), valid, **options)


def test_least_certain_points_are_chosen(monkeypatch):
    drawn = []
    monkeypatch.setattr(points_module, "random_points", lambda *a: drawn.append(random_points(*a)) or drawn[-1])
    masks = torch.randn(3, 4, 6)
    target = torch.zeros(3, 8, 9, dtype=torch.int64)
    chosen = choose(masks, target, valid=(0.9, 0.8))
    assert [tuple(points.shape) for points in drawn] == [(3, 120, 2), (3, 10, 2)] and chosen.shape == (3, 40, 2)
    for number in range(3):
        certainty = sample_logits(masks[number : number + 1, None], drawn[0][number : number + 1], (0.9, 0.8))
        order = certainty[0, 0].abs().argsort()[:30].tolist()
        kept = {tuple(point) for point in chosen[number, :30].tolist()}
        assert kept == {tuple(drawn[0][number, i].tolist()) for i in order}
        assert torch.equal(chosen[number, 30:], drawn[1][number])


def test_unlabelled_candidates_are_left_to_the_last():
    target = torch.full((1, 10, 10), -100)
    target[:, :, :5] = 2
    masks = torch.full((1, 4, 4), 5.0)
    masks[:, :, 2:] = 0.0  # least certain where nothing is labelled
    torch.manual_seed(0)
    chosen = choose(masks, target, importance=1.0)
    assert (chosen[..., 0] < 0.5).all()
    nowhere = choose(masks, torch.full((1, 10, 10), -100))
    assert nowhere.shape == (1, 40, 2) and bool(nowhere.isfinite().all())


@pytest.mark.parametrize("importance, oversample, num_points", [(0.0, 3.0, 7), (1.0, 1.0, 7), (0.75, 2.5, 1)])
def test_extreme_shares_of_points_are_valid(importance, oversample, num_points):
    target = torch.zeros(2, 3, 3, dtype=torch.int64)
    options = {"importance": importance, "oversample": oversample, "num_points": num_points}
    assert choose(torch.randn(2, 2, 2), target, **options).shape == (2, num_points, 2)
