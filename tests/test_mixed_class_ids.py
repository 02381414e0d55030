"""Class ids of a mixture of masks, against the mixture of all masks at all pixels in float64."""

import pytest
import torch
from pretended_cuda import Pretended, pretended_cuda

from dinoseg.core import class_ids as module
from dinoseg.core.class_ids import mixed_class_ids
from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import MaskOutputs, Prediction
from dinoseg.models.heads.semantic import semantic_map, weighted_masks

CASES = (  # images, masks, classes, grid, size, share of the grid
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


@pytest.mark.parametrize("single", [module._SINGLE, 10**9, 0], ids=["", "whole tiles", "single pixels"])
@pytest.mark.parametrize(("sharp", "weak"), [(1, 0), (4, 0.5), (9, 0.9), (0, 1)])
def test_ids_are_those_of_all_masks_at_all_pixels(monkeypatch, sharp, weak, single):
    monkeypatch.setattr(module, "_SINGLE", single)
    monkeypatch.setattr(module, "_CACHED", 2**13)  # several tiles
    for images, masks, classes, grid, size, valid in CASES:
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
        monkeypatch.setattr(module, "_SINGLE", single)
        assert mixed_class_ids(logits, shares, (40, 60), (1.0, 1.0)).eq(1).all()
        assert mixed_class_ids(logits, shares.flip(2), (40, 60), (1.0, 1.0)).eq(0).all()


def test_all_masks_that_are_left_out_count_together():
    """Three of a thousandth each outweigh two of them."""
    logits, shares = torch.full((1, 5, 4, 4), 9.0), torch.tensor([[[0.5, 0.0], [0.0, 0.502], *[[0.001, 0.0]] * 3]])
    assert mixed_class_ids(logits, shares, (40, 60), (1.0, 1.0)).eq(0).all()


def test_ties_are_won_by_the_first_class(monkeypatch):
    monkeypatch.setattr(module, "_CACHED", 1)  # tiles of a column
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

    original = module.upsample_tile
    monkeypatch.setattr(module, "upsample_tile", spy)
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

    def refuse(*_):
        raise AssertionError("scores of all pixels")

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
        monkeypatch.setattr(module, "_MIXED_LAUNCHED", numbers)
        with pretended_cuda() as waits:
            ids = mixed_class_ids(Pretended(logits), Pretended(shares), size, valid)
            assert waits.take() == {}
        assert torch.equal(ids.memory, mixed_class_ids(logits, shares, size, valid))
