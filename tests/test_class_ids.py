"""Ids of a grid's classes against the highest of all upsampled scores, to the bit."""

import random

import pytest
import torch

from dinoseg import class_ids as rooms
from dinoseg.class_ids import class_ids
from dinoseg.geometry import lattice, upsample, upsample_at, valid_share
from dinoseg.shapes import Prediction


def expected(scores, size, valid):
    return upsample(scores, size, valid).max(dim=1).indices.to(torch.uint8)


def smooth(draw, classes, grid):
    coarse = torch.randn(1, classes, 3, 4, generator=draw) * 4
    scores = torch.nn.functional.interpolate(coarse, grid, mode="bicubic")
    return scores + 0.1 * torch.randn(1, classes, *grid, generator=draw)


def test_ids_are_those_of_all_scores_at_any_size_and_share():
    draw, choose = torch.Generator().manual_seed(0), random.Random(0)
    for number in range(150):
        patch = choose.choice([8, 14, 16])
        image = (choose.randint(1, 150), choose.randint(1, 150))
        size = choose.choice([image, (choose.randint(1, 200), choose.randint(1, 200)), (3 * image[0], 2 * image[1])])
        grid, classes = (-(-image[0] // patch), -(-image[1] // patch)), choose.choice([1, 2, 5, 40])
        scores = smooth(draw, classes, grid) if number % 2 else torch.randn(2, classes, *grid, generator=draw)
        given = (scores, size, valid_share(image, patch))
        assert torch.equal(class_ids(*given), expected(*given)), (image, size, patch, classes)


@pytest.mark.parametrize("size", [(154, 224), (160, 231), (11, 224), (200, 16)], ids=str)
@pytest.mark.parametrize("kind", ["zeros", "halves", "twins", "last place", "infinite", "channels last", "bfloat16"])
def test_ties_go_to_the_first_class_as_rounding_has_it(size, kind):
    draw = torch.Generator().manual_seed(1)
    scores = smooth(draw, 12, (11, 16))
    if kind == "zeros":
        scores = torch.zeros_like(scores)
    elif kind == "halves":
        scores = (scores * 2).round() / 2
    elif kind == "twins":
        scores = torch.cat([scores, scores], dim=1)
    elif kind == "last place":  # classes apart by rounding alone, in all cells
        scores = scores[:, :1] + torch.randint(0, 3, scores.shape, generator=draw) * 2.0**-22
    elif kind == "infinite":
        scores[0, 3, 4, 5] = torch.inf
    elif kind == "channels last":
        scores = scores.contiguous(memory_format=torch.channels_last)
    else:
        scores = scores.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = class_ids(scores, size, (1.0, 1.0))
    if kind == "infinite":  # beside it, 0 * infinity is no number
        known = ~upsample(scores, size, (1.0, 1.0)).isnan().any(dim=1)
        assert torch.equal(result[known], expected(scores, size, (1.0, 1.0))[known])
    else:
        assert torch.equal(result, expected(scores.contiguous(), size, (1.0, 1.0)))


def test_scores_that_are_no_numbers_give_some_class():
    scores = torch.randn(1, 5, 6, 7)
    scores[0, 2, 3, 3] = torch.nan
    assert class_ids(scores, (96, 112), (1.0, 1.0)).max() < 5


def test_scores_of_all_pixels_are_never_held(monkeypatch):
    held = []

    def counted(scores, *given):
        pixels = upsample(scores, *given)
        held.append(pixels.numel())
        return pixels

    monkeypatch.setattr(rooms, "upsample", counted)
    scores = smooth(torch.Generator().manual_seed(0), 50, (20, 30))
    for size in ((320, 480), (60, 90)):  # tiles; cells that are small, class by class
        held.clear()
        assert torch.equal(class_ids(scores, size, (1.0, 1.0)), expected(scores, size, (1.0, 1.0)))
        assert max(held) <= size[0] * size[1]


def test_a_prediction_of_a_grid_reads_it_and_one_without_its_scores():
    scores, size, valid = smooth(torch.Generator().manual_seed(0), 7, (9, 11)), (120, 150), valid_share((120, 150), 14)
    places = lattice(size)

    def refused(*_):
        raise AssertionError("scores at full size were asked for")

    of_grid = Prediction(scores, size, valid, refused, grid=scores)
    of_scores = Prediction(scores, size, valid, upsample)
    assert torch.equal(of_grid.class_ids(), of_scores.class_ids())
    assert torch.equal(of_grid.class_ids((31, 57)), of_scores.class_ids((31, 57)))
    for part, wanted in zip(of_grid.class_ids_and_logits(places), of_scores.class_ids_and_logits(places), strict=True):
        torch.testing.assert_close(part, wanted, atol=1e-4, rtol=0)
    exact = upsample(scores.double(), size, valid)[..., places[0], places[1]]
    torch.testing.assert_close(upsample_at(scores.double(), size, valid, places), exact, atol=1e-4, rtol=0)
