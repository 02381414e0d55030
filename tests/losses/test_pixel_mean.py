"""The hardest pixels, against all logits at once in float64, written from their definitions."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from test_full_resolution import WEIGHTS, all_logits, gradient, refuse_scores

from dinoseg.core.geometry import valid_share
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses import full_resolution
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.focal import Focal
from dinoseg.losses.overlap import Dice
from dinoseg.losses.pixel_mean import Hardest
from dinoseg.losses.weighted_sum import WeightedSum
from dinoseg.utils.errors import UserError

SIZES = [(21, 34), (40, 7), (1, 1), (1, 60), (33, 33)]


def random_blocks(size, seed, dtype=torch.float64):
    """Return a prediction, and masks of blocks: void between some, an image of one class, one all void."""
    draw = torch.Generator().manual_seed(seed)
    blocks = torch.tensor([0, 1, 3, 4])[torch.randint(0, 4, (4, -(-size[0] // 9), -(-size[1] // 9)), generator=draw)]
    mask = blocks.repeat_interleave(9, 1).repeat_interleave(9, 2)[:, : size[0], : size[1]].contiguous()
    mask[0, :, 4:6] = 255
    mask[0][torch.rand(size, generator=draw) < 0.1] = 255
    mask[2], mask[3] = 1, 255
    grid = 3 * torch.randn(4, 5, -(-size[0] // 8), -(-size[1] // 8), dtype=torch.float64, generator=draw)
    grid = grid.to(dtype).requires_grad_()
    batch = Batch(torch.zeros(4, 3, 1, 1), mask.to(torch.uint8), [""] * 4)
    return Prediction(grid, size, valid_share(size, 8), refuse_scores, grid=grid), batch


def entropy(log_shares, target, smoothing=0.0):
    """Return what pixels (N,) cost by log shares (K, N) and targets (N,)."""
    own = -WEIGHTS.double()[target] * log_shares.gather(0, target[None])[0]
    return (1 - smoothing) * own + smoothing / 5 * sum(-log_shares[k] * WEIGHTS[k].double() for k in range(5))


def focal_costs(log_shares, target):
    own = log_shares.gather(0, target[None])[0]
    return -WEIGHTS.double()[target] * (1 - own.exp()) ** 2 * own


def mean(cost, logits, mask, share):
    """Return the mean over the hardest of each image, sorted."""
    total, norm = logits.sum() * 0, 0.0
    for scores, ids in zip(logits.log_softmax(1), mask.long(), strict=True):
        known = ids != 255
        if known.any():
            costs = cost(scores[:, known], ids[known])
            # pixels alike with the last one, as at an image's rim, count too
            kept = costs >= sorted(costs.tolist())[-math.ceil(share * len(costs))] - 1e-9
            total, norm = total + costs[kept].sum(), norm + WEIGHTS[ids[known]].double()[kept].sum()
    return total / norm if norm else total


def by_mean(cost, share):
    return lambda logits, mask: mean(cost, logits, mask, share)


LOSSES = {
    "hardest": (CrossEntropy(WEIGHTS, hard_fraction=0.4), by_mean(entropy, 0.4)),
    "smoothed": (
        CrossEntropy(WEIGHTS, label_smoothing=0.2, hard_fraction=0.1),
        by_mean(lambda *of: entropy(*of, smoothing=0.2), 0.1),
    ),
    "focal": (Focal(WEIGHTS, hard_fraction=0.25), by_mean(focal_costs, 0.25)),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in each direction."""
    monkeypatch.setattr(full_resolution, "ROWS", 8)
    monkeypatch.setattr(full_resolution, "CACHED", 8 * 5 * 17)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", range(2))
def test_value_and_gradient_are_those_of_all_pixels_at_once(name, seed):
    loss, reference = LOSSES[name]
    for size in SIZES[seed::2]:
        for dtype, within in ((torch.float64, 1e-11), (torch.float32, 2e-6)):
            prediction, batch = random_blocks(size, seed, dtype)
            value, parts = loss(prediction, batch)
            found = gradient(value, prediction.grid)
            exact = prediction.grid.detach().double().requires_grad_()
            expected = reference(all_logits(exact, size, prediction.valid), batch.mask)
            wanted = gradient(expected, exact)
            assert value.dtype == found.dtype == dtype and not parts["weight"].requires_grad
            assert value.item() == pytest.approx(expected.item(), rel=within, abs=within)
            assert (found - wanted).abs().max() <= within * max(wanted.abs().max(), 1e-2)


def test_the_hardest_are_chosen_in_each_image_by_itself():
    costs = torch.tensor([[[0.0, 5.0, 1.0, 9.0, 3.0]], [[7.0, 7.0, 7.0, 1.0, 8.0]], [[1.0, 2.0, 3.0, 4.0, 5.0]]])
    labelled = torch.tensor([[[1, 1, 1, 0, 1]], [[1, 1, 1, 1, 1]], [[0, 0, 0, 0, 0]]]).bool()

    def select_hardest(share):
        return [row.nonzero()[:, 1].tolist() for row in Hardest(share).select_pixels(costs, labelled)]

    assert select_hardest(0.5) == [[1, 4], [0, 1, 2, 4], []]  # three cost as much as the third
    assert select_hardest(0.01) == [[1], [4], []]  # one at least
    assert select_hardest(0.51) == [[1, 2, 4], [0, 1, 2, 4], []]
    costs[0, 0, 2] = torch.nan
    assert Hardest(0.01).select_pixels(costs, labelled)[0, 0, 2]  # so that the loss is no number, and training stops


def test_cost_of_an_image_is_independent_of_its_batch():
    prediction, batch = random_blocks(SIZES[0], 1)
    loss = CrossEntropy(WEIGHTS, hard_fraction=0.3)
    whole, parts = loss(prediction, batch)
    total = norm = 0.0
    for row in range(4):
        alone = Batch(batch.image[row : row + 1], batch.mask[row : row + 1], [""])
        value, own = loss(prediction.of_images(slice(row, row + 1)), alone)
        total, norm = total + float(value.detach() * own["weight"]), norm + float(own["weight"])
    assert norm == pytest.approx(float(parts["weight"])) and total / norm == pytest.approx(whole.item())


def test_weights_of_pixels_take_no_kernel(monkeypatch):
    """The kernel of CUDA takes all pixels alike."""
    asked = []
    monkeypatch.setattr(full_resolution.Fused, "takes", lambda fused, grid: asked.append(fused.form) or False)
    prediction, batch = random_blocks(SIZES[0], 0)
    CrossEntropy(WEIGHTS, hard_fraction=0.5)(prediction, batch)
    assert not asked
    Dice(WEIGHTS)(prediction, batch)
    assert len(asked) == 1


def axis_weights(length, cells):
    """Return the bilinear weights (length, cells) of an axis, pixel centres aligned, as a loop."""
    weights = np.zeros((length, cells))
    for pixel in range(length):
        position = min(max((pixel + 0.5) * cells / length - 0.5, 0), cells - 1)
        low = math.floor(position)
        weights[pixel, low] += 1 - (position - low)
        weights[pixel, min(low + 1, cells - 1)] += position - low
    return weights


def official(grid, mask):
    """Return mmseg's loss with avg_non_ignore=False and its gradient by the grid, in numpy float64."""
    rows, columns = axis_weights(mask.shape[1], grid.shape[2]), axis_weights(mask.shape[2], grid.shape[3])
    scores = np.einsum("yh,bkhw,xw->bkyx", rows, grid, columns, optimize=True)
    shares = np.exp(scores - scores.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    labelled = mask != 255
    truth = (np.where(labelled, mask, 0)[:, None] == np.arange(grid.shape[1])[None, :, None, None]).astype(float)
    costs = -np.log((shares * truth).sum(1)) * labelled
    slopes = (shares - truth) * labelled[:, None] / mask.size
    return costs.mean(), np.einsum("yh,bkyx,xw->bkhw", rows, slopes, columns, optimize=True)


@pytest.mark.parametrize("make", [CrossEntropy, lambda *a, **o: Focal(*a, gamma=0.0, **o)], ids=["ce", "focal"])
@pytest.mark.parametrize("size", [(21, 34), (33, 33), (1, 7), (40, 9)])
def test_the_mean_over_all_pixels_is_that_of_mmsegmentation(make, size):
    for seed in range(3):
        draw = np.random.default_rng(seed)
        mask = draw.integers(0, 5, (3, *size)).astype(np.uint8)
        mask[draw.random(mask.shape) < 0.4] = 255
        mask[1, size[0] // 2 :] = 255  # padding
        mask[2] = 255
        grid = draw.normal(0, 3, (3, 5, -(-size[0] // 8), -(-size[1] // 8)))
        value, slope = official(grid, mask)
        given = torch.from_numpy(grid).requires_grad_()
        prediction = Prediction(given, size, (1.0, 1.0), refuse_scores, grid=given)
        batch = Batch(torch.zeros(3, 3, 1, 1), torch.from_numpy(mask), [""] * 3)
        loss = make(torch.ones(5), average="all")
        found, parts = loss(prediction, batch)
        assert found.item() == pytest.approx(value, rel=1e-12) and parts["weight"].item() == mask.size
        assert loss.divisors(batch).tolist() == [mask.size]
        np.testing.assert_allclose(gradient(found, given).numpy(), slope, rtol=1e-10, atol=1e-14)


def test_over_all_pixels_class_weights_change_only_the_sum():
    prediction, batch = random_blocks(SIZES[0], 4)
    labelled, all_pixels = (CrossEntropy(WEIGHTS, average=average) for average in ("labelled", "all"))
    value, parts = labelled(prediction, batch)
    found, counted = all_pixels(prediction, batch)
    assert counted["weight"].item() == batch.mask.numel() > 0
    assert found.item() == pytest.approx((value * parts["weight"] / batch.mask.numel()).item(), rel=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CrossEntropy(WEIGHTS, hard_fraction=0),
            "^hard_fraction=0 is out of range. Give a number above 0 and at most 1",
        ),
        (lambda: Focal(WEIGHTS, hard_fraction=1.5), "^hard_fraction=1.5 is out of range. Give"),
        (lambda: CrossEntropy(WEIGHTS, hard_fraction=math.nan), "^hard_fraction=nan is out of range"),
        (
            lambda: CrossEntropy(WEIGHTS, average="known"),
            "^average=known is unknown. Choose one of labelled",
        ),
        (lambda: Focal(WEIGHTS, average="all", hard_fraction=0.5), "average=all and hard_fraction=0.5 exclude"),
        (
            lambda: WeightedSum({"ce": partial(CrossEntropy, hard_fraction=2)}, {"ce": 1.0}, WEIGHTS),
            "^terms.ce.hard_fraction=2 is out of range. Give",
        ),
    ],
)
def test_parameters_out_of_range_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
