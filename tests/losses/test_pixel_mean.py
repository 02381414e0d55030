"""Means over the hardest pixels, against all logits at once in float64, and over all pixels."""

from functools import partial

import pytest
import torch
from test_full_resolution import (  # noqa: F401 - small_tiles is a fixture
    WEIGHTS,
    all_logits,
    entropies,
    focal_costs,
    gradient,
    hardest,
    refuse_scores,
    small_tiles,
)

from dinoseg.core.geometry import valid_share
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.focal import Focal
from dinoseg.losses.pixel_mean import Hardest

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


LOSSES = {
    "hardest": (CrossEntropy(WEIGHTS, hard_fraction=0.4), partial(hardest, share=0.4)),
    "smoothed": (
        CrossEntropy(WEIGHTS, label_smoothing=0.2, hard_fraction=0.1),
        partial(hardest, share=0.1, costs_of=partial(entropies, smoothing=0.2)),
    ),
    "focal": (Focal(WEIGHTS, hard_fraction=0.25), partial(hardest, share=0.25, costs_of=focal_costs)),
}


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
            expected = reference(all_logits(exact, size, prediction.valid), batch.mask.long())
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


def test_over_all_pixels_the_weight_counts_ignored_ones_too():
    prediction, batch = random_blocks(SIZES[0], 4)
    loss = CrossEntropy(WEIGHTS, average="all")
    assert loss(prediction, batch)[1]["weight"] == batch.mask.numel() and loss.divisors(batch) == batch.mask.numel()
