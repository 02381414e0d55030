"""Ids of a grid's classes against the highest of all upsampled scores, to the bit."""

import random

import pytest
import torch
import torch.nn.functional as F
from pretended_cuda import Pretended, pretended_cuda

from dinoseg.core import class_ids as rooms
from dinoseg.core.class_ids import argmax_ids, class_ids
from dinoseg.core.geometry import lattice, upsample, upsample_at, valid_share
from dinoseg.core.shapes import Prediction


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Let small images go the ways of large ones."""
    monkeypatch.setattr(rooms, "_SMALL", 0)


def smooth(draw, classes, grid):
    coarse = torch.randn(1, classes, 3, 4, generator=draw) * 4
    scores = F.interpolate(coarse, grid, mode="bicubic")
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
        assert torch.equal(class_ids(*given), argmax_ids(upsample(*given))), (image, size, patch, classes)


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
    pixels = upsample(scores.contiguous(), size, (1.0, 1.0))
    if kind == "infinite":  # beside it, 0 * infinity is no number
        known = ~pixels.isnan().any(dim=1)
        assert torch.equal(result[known], argmax_ids(pixels)[known])
    elif kind in ("zeros", "twins"):
        assert torch.equal(result, argmax_ids(pixels))
    else:
        lost = pixels.amax(1) - pixels.gather(1, result[:, None].long())[:, 0]
        assert lost.max() <= 4 * torch.finfo(torch.float32).eps * scores.abs().max()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_any_number_of_threads_and_bands_gives_the_same(mode, monkeypatch):
    scores = smooth(torch.Generator().manual_seed(0), 12, (11, 16))
    threads = torch.get_num_threads()
    try:
        with mode():
            wanted = class_ids(scores, (154, 224), (0.95, 1.0))
            for count, band in ((1, 1), (2, 1), (3, 500)):
                torch.set_num_threads(count)
                monkeypatch.setattr(rooms, "_BAND", band)
                assert torch.equal(class_ids(scores, (154, 224), (0.95, 1.0)), wanted)
    finally:
        torch.set_num_threads(threads)


def test_nan_scores_still_give_valid_class_ids():
    scores = torch.randn(1, 5, 6, 7)
    scores[0, 2, 3, 3] = torch.nan
    assert class_ids(scores, (96, 112), (1.0, 1.0)).max() < 5


def test_scores_of_all_pixels_are_never_in_memory(monkeypatch):
    held = []

    def record_sizes(function):
        def call_and_record(*given):
            made = function(*given)
            held.append(made.numel() * given[0].shape[1])
            return made

        return call_and_record

    scores, size = smooth(torch.Generator().manual_seed(0), 50, (20, 30)), (384, 576)
    wanted = argmax_ids(upsample(scores, size, (1.0, 1.0)))
    monkeypatch.setattr(rooms, "_best", record_sizes(rooms._best))
    assert torch.equal(class_ids(scores, size, (1.0, 1.0)), wanted)
    assert max(held) <= rooms._AT_ONCE and sum(held) < size[0] * size[1] * 50 / 10
    held.clear()
    monkeypatch.setattr(rooms, "upsample", record_sizes(upsample))
    monkeypatch.setattr(rooms, "_LOOK", 1e9)
    assert torch.equal(class_ids(scores, size, (1.0, 1.0)), wanted)
    assert len(held) == 50 and max(held) == size[0] * size[1]


def test_class_ids_skip_upsampling_only_where_that_is_cheaper(monkeypatch):
    def refuse_upsampling(*_):
        raise AssertionError("all classes were upsampled")

    draw = torch.Generator().manual_seed(0)
    monkeypatch.setattr(rooms, "_one_by_one", refuse_upsampling)
    class_ids(smooth(draw, 12, (20, 30)), (320, 480), (1.0, 1.0))
    for scores, size in (
        (torch.randn(1, 12, 20, 30, generator=draw), (320, 480)),
        (smooth(draw, 12, (20, 30)), (40, 60)),
    ):
        with pytest.raises(AssertionError, match="all classes"):
            class_ids(scores, size, (1.0, 1.0))


def test_on_an_accelerator_few_numbers_are_upsampled_as_a_whole(monkeypatch):
    scores, size = smooth(torch.Generator().manual_seed(0), 4, (11, 16)), (40, 50)
    passed, one_by_one = [], rooms._one_by_one
    monkeypatch.setattr(rooms, "_one_by_one", lambda *given: passed.append(1) or one_by_one(*given))
    for most, parts in ((4 * 40 * 50, 0), (4 * 40 * 50 - 1, 1)):
        monkeypatch.setattr(rooms, "_LAUNCHED", most)
        with pretended_cuda():
            ids = class_ids(Pretended(scores), size, (1.0, 1.0))
        assert torch.equal(ids.memory, argmax_ids(upsample(scores, size, (1.0, 1.0)))) and len(passed) == parts


def test_on_an_accelerator_a_large_batch_is_upsampled_in_parts(monkeypatch):
    draw, size = torch.Generator().manual_seed(0), (40, 50)
    scores = torch.cat([smooth(draw, 4, (11, 16)) for _ in range(5)])
    images = []
    monkeypatch.setattr(rooms, "upsample", lambda some, *given: images.append(len(some)) or upsample(some, *given))
    monkeypatch.setattr(rooms, "_LAUNCHED", 2 * 4 * 40 * 50)
    with pretended_cuda():
        ids = class_ids(Pretended(scores), size, (1.0, 1.0))
    assert images == [2, 2, 1] and torch.equal(ids.memory, argmax_ids(upsample(scores, size, (1.0, 1.0))))


def test_grid_prediction_needs_no_scores_at_full_size():
    scores, size, valid = smooth(torch.Generator().manual_seed(0), 7, (9, 11)), (120, 150), valid_share((120, 150), 14)
    places = lattice(size)

    def refuse_scores(*_):
        raise AssertionError("scores at full size were asked for")

    of_grid = Prediction(scores, size, valid, refuse_scores, grid=scores)
    of_scores = Prediction(scores, size, valid, upsample)
    assert torch.equal(of_grid.class_ids(), of_scores.class_ids())
    assert torch.equal(of_grid.class_ids((31, 57)), of_scores.class_ids((31, 57)))
    for part, wanted in zip(of_grid.class_ids_and_logits(places), of_scores.class_ids_and_logits(places), strict=True):
        torch.testing.assert_close(part, wanted, atol=1e-4, rtol=0)
    exact = upsample(scores.double(), size, valid)[..., places[0], places[1]]
    torch.testing.assert_close(upsample_at(scores.double(), size, valid, places), exact, atol=1e-4, rtol=0)


def test_small_images_are_upsampled_as_a_whole(monkeypatch):
    scores = smooth(torch.Generator().manual_seed(0), 4, (11, 16))
    monkeypatch.setattr(rooms, "_SMALL", 4 * 40 * 50)
    monkeypatch.setattr(rooms, "_pays", None)
    assert torch.equal(class_ids(scores, (40, 50), (1.0, 1.0)), argmax_ids(upsample(scores, (40, 50), (1.0, 1.0))))
    with pytest.raises(TypeError):
        class_ids(scores, (40, 51), (1.0, 1.0))
