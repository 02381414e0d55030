"""Class ids of a grid or of a mixture of masks, against the scores of all classes at all pixels."""

import random

import pytest
import torch
import torch.nn.functional as F
from pretended_cuda import Pretended, pretended_cuda

from dinoseg.core import class_ids as rooms
from dinoseg.core.class_ids import argmax_ids, class_ids, mixed_class_ids
from dinoseg.core.geometry import lattice, upsample, upsample_at, valid_share
from dinoseg.core.shapes import MaskOutputs, Prediction
from dinoseg.models.heads.semantic import semantic_map, weighted_masks


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Let small images go the ways of large ones."""
    monkeypatch.setattr(rooms, "_SMALL", 0)


def refuse(*_):
    raise AssertionError("all scores at full size were computed")


def smooth(draw, classes, grid):
    coarse = torch.randn(1, classes, 3, 4, generator=draw) * 4
    scores = F.interpolate(coarse, grid, mode="bicubic")
    return scores + 0.1 * torch.randn(1, classes, *grid, generator=draw)


def test_ids_are_those_of_all_scores_at_any_size_and_share():
    draw = torch.Generator().manual_seed(0)
    choose = random.Random(0)
    for number in range(60):
        patch = choose.choice([8, 14, 16])
        image = (choose.randint(1, 150), choose.randint(1, 150))
        size = choose.choice([image, (choose.randint(1, 200), choose.randint(1, 200)), (3 * image[0], 2 * image[1])])
        grid = (-(-image[0] // patch), -(-image[1] // patch))
        classes = choose.choice([1, 2, 5, 40])
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
    interpolate = torch.Tensor.addcmul_

    def interpolate_and_record(pixels, *given):
        held.append(pixels.numel())
        return interpolate(pixels, *given)

    def upsample_and_record(*given):
        held.append(upsample(*given).numel())
        return upsample(*given)

    scores = smooth(torch.Generator().manual_seed(0), 50, (20, 30))
    size = (384, 576)
    wanted = argmax_ids(upsample(scores, size, (1.0, 1.0)))
    monkeypatch.setattr(torch.Tensor, "addcmul_", interpolate_and_record)
    assert torch.equal(class_ids(scores, size, (1.0, 1.0)), wanted)
    assert held and max(held) <= rooms._AT_ONCE and sum(held) < size[0] * size[1] * 50 / 10
    held.clear()
    monkeypatch.setattr(rooms, "upsample", upsample_and_record)
    monkeypatch.setattr(rooms, "_CELL_COST", 1e9)
    assert torch.equal(class_ids(scores, size, (1.0, 1.0)), wanted)
    assert len(held) == 50 and max(held) == size[0] * size[1]


def test_class_ids_skip_upsampling_only_where_that_is_cheaper(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    monkeypatch.setattr(rooms, "upsample", refuse)  # which the method by cells does not need
    class_ids(smooth(draw, 12, (20, 30)), (320, 480), (1.0, 1.0))
    for scores, size in (
        (torch.randn(1, 12, 20, 30, generator=draw), (320, 480)),
        (smooth(draw, 12, (20, 30)), (40, 60)),
    ):
        with pytest.raises(AssertionError, match="all scores"):
            class_ids(scores, size, (1.0, 1.0))


def test_on_an_accelerator_all_scores_that_fit_are_upsampled(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    scores = torch.cat([smooth(draw, 4, (11, 16)) for _ in range(5)])
    size = (40, 50)
    shapes = []
    wanted = argmax_ids(upsample(scores, size, (1.0, 1.0)))
    monkeypatch.setattr(rooms, "upsample", lambda some, *given: shapes.append(some.shape[:2]) or upsample(some, *given))
    image = 4 * 40 * 50  # upsampled numbers
    for most, expected in ((2 * image, [(2, 4), (2, 4), (1, 4)]), (image, [(1, 4)] * 5), (image - 1, [(5, 1)] * 4)):
        shapes.clear()
        monkeypatch.setattr(rooms, "_LAUNCHED", most)
        with pretended_cuda():
            ids = class_ids(Pretended(scores), size, (1.0, 1.0))
        assert shapes == expected and torch.equal(ids.memory, wanted)


def test_grid_prediction_needs_no_scores_at_full_size():
    scores = smooth(torch.Generator().manual_seed(0), 7, (9, 11))
    size = (120, 150)
    valid = valid_share((120, 150), 14)
    places = lattice(size)
    of_grid = Prediction(scores, size, valid, refuse, grid=scores)
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
    wholes = []
    monkeypatch.setattr(
        rooms, "upsample", lambda some, *given: wholes.append(len(some[0]) == 4) or upsample(some, *given)
    )
    assert torch.equal(class_ids(scores, (40, 50), (1.0, 1.0)), argmax_ids(upsample(scores, (40, 50), (1.0, 1.0))))
    assert wholes == [True]
    class_ids(scores, (40, 51), (1.0, 1.0))
    assert not any(wholes[1:])


MIXTURES = (  # images, masks, classes, grid, size, share of the grid
    (2, 20, 5, (9, 13), (70, 101), (0.93, 1.0)),
    (1, 100, 150, (8, 9), (37, 50), (1.0, 0.9)),
    (1, 7, 3, (11, 17), (11, 17), (1.0, 1.0)),  # each pixel is its cell
    (1, 7, 3, (11, 6), (11, 40), (1.0, 1.0)),
    (1, 7, 3, (12, 18), (5, 7), (1.0, 1.0)),  # a smaller image
    (1, 1, 1, (1, 1), (1, 1), (1.0, 1.0)),
    (1, 1, 4, (1, 3), (1, 33), (1.0, 1.0)),
    (1, 30, 2, (2, 2), (90, 1), (0.6, 0.5)),
)


def mixture(images, masks, classes, grid, sharp, weak):
    """Return logits and shares of regions with edges, and of masks that are hardly anything."""
    draw = torch.Generator().manual_seed(masks + classes)
    logits = torch.randn(images, masks, *grid, generator=draw, dtype=torch.float64) * sharp - sharp / 2
    shares = (torch.randn(images, masks, classes + 1, generator=draw, dtype=torch.float64) * sharp).softmax(-1)[..., 1:]
    shares[:, : int(weak * masks)] *= 1e-3
    return logits.float(), shares.float()


@pytest.mark.parametrize("single", [rooms._SINGLE, 10**9, 0], ids=["", "whole tiles", "single pixels"])
@pytest.mark.parametrize(("sharp", "weak"), [(1, 0), (4, 0.5), (9, 0.9), (0, 1)])
def test_ids_are_those_of_all_masks_at_all_pixels(monkeypatch, sharp, weak, single):
    monkeypatch.setattr(rooms, "_SINGLE", single)
    monkeypatch.setattr(rooms, "_CACHED", 2**13)  # several tiles
    for images, masks, classes, grid, size, valid in MIXTURES:
        logits, shares = mixture(images, masks, classes, grid, sharp, weak)
        pixels = upsample(logits.double(), size, valid).sigmoid()
        scores = torch.einsum("bqk,bqhw->bkhw", shares.double(), pixels)
        ids = mixed_class_ids(logits, shares, size, valid)
        assert ids.dtype == torch.uint8 and ids.shape == (images, *size)
        short = scores.amax(1) - scores.gather(1, ids[:, None].long())[:, 0]
        assert (short <= 2e-6 * shares.sum(1).amax()).all()  # another id where two scores tie but for rounding


def test_masks_that_are_left_out_decide_where_classes_are_close(monkeypatch):
    """Two masks of half a share each; a third one, left out of all tiles, is what tips the scale."""
    logits = torch.full((1, 3, 4, 4), 9.0)
    shares = torch.tensor([[[0.5, 0.0], [0.0, 0.5], [0.0, 0.001]]])
    for single in (10**9, 0):
        monkeypatch.setattr(rooms, "_SINGLE", single)
        assert mixed_class_ids(logits, shares, (40, 60), (1.0, 1.0)).eq(1).all()
        assert mixed_class_ids(logits, shares.flip(2), (40, 60), (1.0, 1.0)).eq(0).all()
    # three of a thousandth each outweigh two of them
    logits = torch.full((1, 5, 4, 4), 9.0)
    shares = torch.tensor([[[0.5, 0.0], [0.0, 0.502], *[[0.001, 0.0]] * 3]])
    assert mixed_class_ids(logits, shares, (40, 60), (1.0, 1.0)).eq(0).all()


def test_ties_are_won_by_the_first_class(monkeypatch):
    monkeypatch.setattr(rooms, "_CACHED", 1)  # tiles of a column
    assert mixed_class_ids(torch.zeros(1, 2, 3, 3), torch.eye(2)[None], (9, 9), (1.0, 1.0)).eq(0).all()
    more = 2**-7  # by a mask that is left out, the first is no less; a logit of 40 is all of a share
    shares = torch.tensor([[[0.5, 0.0], [0.0, 0.5 + more], [more, 0.0]]])
    assert mixed_class_ids(torch.full((1, 3, 3, 3), 40.0), shares, (9, 9), (1.0, 1.0)).eq(0).all()


def test_fewer_numbers_are_upsampled_where_few_masks_matter(monkeypatch):
    numbers = []

    def spy(cells, down, along):
        tile = original(cells, down, along)
        numbers.append(tile.numel())
        return tile

    original = rooms.upsample_tile
    monkeypatch.setattr(rooms, "upsample_tile", spy)
    logits, shares = torch.full((1, 50, 8, 8), -9.0), torch.full((1, 50, 3), 1e-3)
    logits[:, 0, :, :4] = logits[:, 1, :, 4:] = 9.0
    shares[:, 0, 0] = shares[:, 1, 1] = 1.0
    assert mixed_class_ids(logits, shares, (64, 64), (1.0, 1.0))[0, 0].tolist() == [0] * 32 + [1] * 32
    assert sum(numbers) <= 2 * 64 * 64


@pytest.mark.parametrize("autocast", [False, True])
def test_mask_prediction_gives_ids_without_full_size_scores(autocast):
    torch.manual_seed(0)
    outputs = MaskOutputs(torch.randn(2, 9, 5), 4 * torch.randn(2, 9, 6, 7))
    size, valid, places = (45, 61), (0.9, 0.95), (slice(2, None, 5), slice(1, None, 6))

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        whole = Prediction(outputs, size, valid, semantic_map, True)
        ours = Prediction(outputs, size, valid, refuse, True, masks=weighted_masks(outputs))
        ids, logits = ours.class_ids_and_logits(places)
    assert torch.equal(ids, whole.class_ids()) and torch.equal(ids, ours.class_ids())
    torch.testing.assert_close(logits, whole.class_ids_and_logits(places)[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.class_ids((9, 8)), whole.class_ids((9, 8)))


def test_an_accelerator_is_not_waited_for(monkeypatch):
    logits, shares = mixture(2, 9, 5, (6, 7), 4, 0.5)
    size, valid = (45, 61), (0.9, 0.95)
    for numbers in (14 * 61 * 10, 1):  # several bands, and one for each row
        monkeypatch.setattr(rooms, "_MIXED_LAUNCHED", numbers)
        with pretended_cuda() as waits:
            ids = mixed_class_ids(Pretended(logits), Pretended(shares), size, valid)
            assert waits.take() == {}
        assert torch.equal(ids.memory, mixed_class_ids(logits, shares, size, valid))
