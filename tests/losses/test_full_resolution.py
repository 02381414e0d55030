"""Losses on tiles against the same of all logits at once, bilinear by `F.grid_sample`, in float64."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from full_logits import all_logits, refuse_scores

from dinoseg.core.geometry import upsample, valid_share
from dinoseg.core.shapes import Batch, Prediction, WeightedMasks
from dinoseg.losses import full_resolution
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.focal import Focal
from dinoseg.losses.overlap import Dice, Tversky
from dinoseg.losses.pixel_mean import Hardest
from dinoseg.losses.weighted_sum import WeightedSum

WEIGHTS = torch.tensor([0.25, 1.0, 3.0, 0.0, 0.5])


def cross_entropy(logits, ids, smoothing=0.0):
    weights = WEIGHTS.to(logits)
    total = F.cross_entropy(logits, ids, weights, ignore_index=255, reduction="sum", label_smoothing=smoothing)
    norm = weights[ids[ids != 255]].sum()
    return total / norm if norm > 0 else total


def focal_costs(logits, ids, gamma=2.0):
    entropy = F.cross_entropy(logits, ids, ignore_index=255, reduction="none")
    return WEIGHTS.to(logits)[ids.where(ids != 255, 0)] * (1 - (-entropy).exp()) ** gamma * entropy


def focal(logits, ids, gamma):
    known = ids != 255
    scores, ids = logits.movedim(1, -1)[known], ids[known]
    weight = WEIGHTS.to(logits)[ids].sum()
    return focal_costs(scores, ids, gamma).sum() / (weight if weight > 0 else 1)


def tversky(logits, ids, alpha, beta):
    shares = logits.softmax(1).movedim(1, -1)[ids != 255]
    own = F.one_hot(ids[ids != 255], 5).to(logits)
    present = own.sum(0) > 0
    shares, own, weights = shares[:, present], own[:, present], WEIGHTS.to(logits)[present]
    hits = (shares * own).sum(0)
    index = hits / (hits + alpha * (shares * (1 - own)).sum(0) + beta * ((1 - shares) * own).sum(0))
    return (weights * (1 - index)).sum() / (weights.sum() if weights.sum() > 0 else 1)


def entropies(logits, ids, smoothing=0.0):
    options = {"ignore_index": 255, "reduction": "none", "label_smoothing": smoothing}
    return F.cross_entropy(logits, ids, WEIGHTS.to(logits), **options)


def hardest(logits, ids, share, costs_of=entropies):
    """Each image's pixels by what they cost, sorted; those alike with the last one, as at a rim, count too."""
    costs = costs_of(logits, ids)
    total = costs.sum() * 0
    norm = 0.0
    for cost, of in zip(costs, ids, strict=True):
        cost, of = cost[of != 255], of[of != 255]
        if len(cost):
            kept = cost >= sorted(cost.tolist())[-math.ceil(share * len(cost))] - 1e-9
            total, norm = total + cost[kept].sum(), norm + WEIGHTS[of[kept]].sum()
    return total / norm if norm else total


LOSSES = {
    "cross-entropy": (CrossEntropy(WEIGHTS), cross_entropy),
    "smoothed": (CrossEntropy(WEIGHTS, label_smoothing=0.2), lambda *of: cross_entropy(*of, smoothing=0.2)),
    "focal": (Focal(WEIGHTS), lambda *of: focal(*of, gamma=2.0)),
    "focal 0": (Focal(WEIGHTS, gamma=0.0), lambda *of: focal(*of, gamma=0.0)),
    "focal 0.5": (Focal(WEIGHTS, gamma=0.5), lambda *of: focal(*of, gamma=0.5)),
    "hardest": (CrossEntropy(WEIGHTS, hard_fraction=0.3), lambda *of: hardest(*of, share=0.3)),
    "all pixels": (CrossEntropy(WEIGHTS, average="all"), lambda *of: entropies(*of).mean()),
    "focal of all pixels": (Focal(WEIGHTS, average="all"), lambda *of: focal_costs(*of).mean()),
    "dice": (Dice(WEIGHTS), lambda *of: tversky(*of, alpha=0.5, beta=0.5)),
    "tversky": (Tversky(WEIGHTS), lambda *of: tversky(*of, alpha=0.3, beta=0.7)),
}
CASES = [  # image, patch, the masks' size, the share that is ignored
    ((32, 48), 8, (32, 48), 0.2),
    ((29, 41), 8, (29, 41), 0.2),  # padded
    ((29, 41), 8, (75, 131), 0.2),  # masks larger than images
    ((40, 56), 8, (13, 9), 0.2),  # and smaller
    ((16, 24), 8, (2, 30), 0.2),  # rows stay
    ((15, 21), 1, (15, 21), 0.2),  # pixels
    ((13, 21), 16, (13, 70), 0.0),
    ((1, 1), 8, (1, 1), 0.0),
    ((7, 90), 8, (1, 90), 0.5),
    ((20, 20), 8, (20, 20), 2.0),  # nothing labelled
]

PRECISIONS = ((torch.float64, 1e-12), (torch.float32, 1e-6))  # and how far results may be off


def random_case(image, patch, size, ignored, seed, dtype=torch.float64, absent=2):
    draw = torch.Generator().manual_seed(seed)
    grid = 3 * torch.randn(2, 5, -(-image[0] // patch), -(-image[1] // patch), dtype=torch.float64, generator=draw)
    mask = torch.randint(0, 5, (2, *size), generator=draw)
    mask[mask == absent] = 3
    mask[torch.rand(mask.shape, generator=draw) < ignored] = 255
    batch = Batch(torch.zeros(2, 3, 1, 1), mask.to(torch.uint8), ["", ""])
    grid = grid.to(dtype).requires_grad_()
    return Prediction(grid, image, valid_share(image, patch), refuse_scores, grid=grid), batch


def gradient(value, grid):
    return torch.autograd.grad(value, grid)[0]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in each direction."""
    monkeypatch.setattr(full_resolution, "ROWS", 8)
    monkeypatch.setattr(full_resolution, "CACHED", 8 * 5 * 17)


def assert_equals_reference(loss, reference, prediction, batch, within):
    """Compare value and gradient with those of a reference on all logits at once; return the parts of the loss."""
    value, parts = loss(prediction, batch)
    found = gradient(value, prediction.grid)
    assert value.dtype == found.dtype == prediction.grid.dtype
    exact = prediction.grid.detach().double().requires_grad_()
    expected = reference(all_logits(exact, batch.mask.shape[1:], prediction.valid), batch.mask.long())
    wanted = gradient(expected, exact)
    assert value.item() == pytest.approx(expected.item(), rel=within, abs=within)
    assert (found - wanted).abs().max() <= within * max(wanted.abs().max(), 1e-3)
    return parts


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradient_are_those_of_all_logits_at_once(name, case):
    for dtype, within in PRECISIONS if case in CASES[:4] else PRECISIONS[:1]:
        assert_equals_reference(*LOSSES[name], *random_case(*case, 0, dtype), within)


@pytest.mark.parametrize("name", LOSSES)
def test_heads_without_a_grid_have_the_same_loss(name):
    prediction, batch = random_case(*CASES[1], 0)
    scores = replace(prediction, to_pixels=upsample, grid=None)
    assert LOSSES[name][0](scores, batch)[0].item() == pytest.approx(
        LOSSES[name][0](prediction, batch)[0].item(), rel=1e-12
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[9]], ids=str)
def test_masks_are_mixed_tile_by_tile(name, case):
    loss, reference = LOSSES[name]
    for dtype, within in PRECISIONS:
        prediction, batch, exact = random_mixture(case, dtype)
        value, _ = loss(prediction, batch)
        found = torch.autograd.grad(value, prediction.masks)
        masks, shares = exact
        scores = torch.einsum("bqk,bqhw->bkhw", shares, all_logits(masks, case[2], prediction.valid).sigmoid())
        expected = reference(scores.log(), batch.mask.long())
        assert value.item() == pytest.approx(expected.item(), rel=within, abs=within)
        for part, wanted in zip(found, torch.autograd.grad(expected, exact), strict=True):
            assert (part - wanted).abs().max() <= within * max(wanted.abs().max(), 1e-3)
        prediction.masks.logits.requires_grad_(False)  # as of a frozen head
        again, _ = loss(prediction, batch)
        assert torch.equal(torch.autograd.grad(again, prediction.masks.shares)[0], found[1]) and again == value


def random_mixture(case, dtype):
    """Return a prediction of 7 masks, a batch, and logits and shares of these in float64."""
    grid, batch = random_case(*case, 0)
    draw = torch.Generator().manual_seed(1)
    masks = torch.cat([grid.grid.detach(), torch.randn(grid.grid[:, :2].shape, generator=draw).double()], dim=1)
    shares = torch.randn(2, 7, 6, generator=draw).double().softmax(-1)[..., :5]
    rounded = [part.to(dtype) for part in (masks, shares)]
    parts = WeightedMasks(*(part.clone().requires_grad_() for part in rounded))
    prediction = Prediction(None, grid.size, grid.valid, refuse_scores, mixture=True, masks=parts)
    return prediction, batch, [part.double().requires_grad_() for part in rounded]


def test_a_score_of_zero_is_held_above_it():
    prediction, batch, _ = random_mixture(CASES[1], torch.float32)
    with torch.no_grad():
        prediction.masks.shares[:, :, 3] = 0
    value, _ = CrossEntropy(torch.ones(5))(prediction, batch)
    assert value.isfinite() and all(part.isfinite().all() for part in torch.autograd.grad(value, prediction.masks))


def test_another_gradient_of_the_value_scales_that_of_the_grid():
    for loss, _ in LOSSES.values():
        prediction, batch = random_case(*CASES[1], 0)
        value, parts = loss(prediction, batch)
        once = gradient(value, prediction.grid)
        twice = gradient(2 * loss(prediction, batch)[0], prediction.grid)
        torch.testing.assert_close(twice, 2 * once, rtol=1e-12, atol=0)
        assert not parts["weight"].requires_grad
        value = loss(prediction, batch)[0]
        assert torch.equal(torch.autograd.grad(value, prediction.grid, retain_graph=True)[0], once)
        assert torch.equal(gradient(value, prediction.grid), once)


QUICK_ON_THREADS = ("cross-entropy", "focal", "hardest", "dice")  # one for each kind of sum


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK_ON_THREADS else [pytest.mark.heavy]) for name in LOSSES],
)
def test_any_number_of_threads_gives_the_same_bits(name):
    loss = LOSSES[name][0]
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            prediction, batch = random_case(*CASES[2], 0, torch.float32)
            value, parts = loss(prediction, batch)
            found.append((value.detach(), parts["weight"], gradient(value, prediction.grid)))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.heavy)], ids=str)
def test_half_precision_is_left_before_upsampling(dtype):
    for loss, _ in LOSSES.values():
        prediction, batch = random_case(*CASES[1], 0, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            value, _ = loss(prediction, batch)
        found = gradient(value, prediction.grid)
        single = prediction.grid.detach().float().requires_grad_()
        expected, _ = loss(Prediction(single, prediction.size, prediction.valid, refuse_scores, grid=single), batch)
        assert torch.equal(value, expected) and found.dtype == dtype
        assert torch.equal(found, gradient(expected, single).to(dtype))


def test_double_differentiation_is_refused():
    for loss, _ in LOSSES.values():
        prediction, batch = random_case(*CASES[0], 0)
        with pytest.raises(NotImplementedError, match="cannot be differentiated twice: leave out create_graph"):
            torch.autograd.grad(loss(prediction, batch)[0], prediction.grid, create_graph=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_validation_has_the_value_alone(mode):
    for loss, _ in LOSSES.values():
        prediction, batch = random_case(*CASES[1], 0)
        expected = loss(prediction, batch)[0]
        with mode():
            outputs = prediction.grid * 1
            found, _ = loss(Prediction(outputs, prediction.size, prediction.valid, refuse_scores, grid=outputs), batch)
        assert torch.equal(found, expected) and not found.requires_grad


def test_weighted_sum_needs_no_full_resolution_scores():
    prediction, batch = random_case(*CASES[1], 0)
    value, _ = WeightedSum({"ce": CrossEntropy, "dice": Dice}, {"ce": 1.0, "dice": 1.0}, WEIGHTS)(prediction, batch)
    torch.testing.assert_close(value, sum(LOSSES[name][0](prediction, batch)[0] for name in ("cross-entropy", "dice")))


@pytest.mark.parametrize("name", LOSSES)
def test_label_outside_the_classes_is_an_error(name):
    prediction, batch = random_case(*CASES[0], 0)
    batch.mask[0, 0, 0] = 5
    with pytest.raises((IndexError, RuntimeError), match="out of (bounds|range)"):
        LOSSES[name][0](prediction, batch)


@pytest.mark.parametrize(("device", "tiles"), [("cpu", (1, 9)), ("meta", (7, 1))])
def test_a_tile_is_a_pixel_wide_or_high_at_least(device, tiles, monkeypatch):
    monkeypatch.setattr(full_resolution, "CACHED", 1)
    monkeypatch.setattr(full_resolution, "LAUNCHED", 1)
    grid, mask = torch.zeros(1, 5, 2, 3, device=device), torch.zeros(1, 7, 9, device=device)
    way = full_resolution._Tiles.over([grid], mask, (1.0, 1.0), 255)
    assert (len(way.bands), len(way.columns)) == tiles


BLOCKS = [(21, 34), (40, 7), (1, 1), (1, 60), (33, 33)]


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


HARDEST = {
    "hardest": (CrossEntropy(WEIGHTS, hard_fraction=0.4), partial(hardest, share=0.4)),
    "smoothed": (
        CrossEntropy(WEIGHTS, label_smoothing=0.2, hard_fraction=0.1),
        partial(hardest, share=0.1, costs_of=partial(entropies, smoothing=0.2)),
    ),
    "focal": (Focal(WEIGHTS, hard_fraction=0.25), partial(hardest, share=0.25, costs_of=focal_costs)),
}


@pytest.mark.parametrize("name", HARDEST)
@pytest.mark.parametrize("seed", range(2))
def test_hardest_pixels_of_blocks_equal_all_pixels_at_once(name, seed):
    for size in BLOCKS[seed::2]:
        for dtype, within in ((torch.float64, 1e-11), (torch.float32, 2e-6)):
            parts = assert_equals_reference(*HARDEST[name], *random_blocks(size, seed, dtype), within)
            assert not parts["weight"].requires_grad


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


def test_over_all_pixels_the_weight_counts_ignored_ones_too():
    prediction, batch = random_blocks(BLOCKS[0], 4)
    loss = CrossEntropy(WEIGHTS, average="all")
    assert loss(prediction, batch)[1]["weight"] == batch.mask.numel() and loss.divisors(batch) == batch.mask.numel()
