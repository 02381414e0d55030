"""Losses on tensors: equal to the classes of a training, whose own tests compare them with references."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mistakes import assert_refused
from test_mask_classification import fix_points

from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Batch, MaskOutputs, Prediction, WeightedMasks
from dinoseg.losses import (
    bce_loss,
    binary_dice_loss,
    cldice_loss,
    compute_class_weights,
    cross_entropy_loss,
    dice_loss,
    focal_loss,
    lovasz_loss,
    mask_classification_loss,
    tversky_loss,
)
from dinoseg.losses.cldice import SoftClDice
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.focal import Focal
from dinoseg.losses.lovasz import Lovasz
from dinoseg.losses.mask_classification import MaskClassification
from dinoseg.losses.overlap import Dice, Tversky

WEIGHTS = [0.5, 2.0, 1.0]
LOSSES = (cross_entropy_loss, focal_loss, dice_loss, tversky_loss, lovasz_loss, cldice_loss)


@pytest.fixture
def batch():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 9, 11, dtype=torch.float64, generator=rng)
    targets = torch.randint(0, 3, (2, 9, 11), generator=rng)
    targets[:, :2] = 255
    return logits, targets


@pytest.mark.parametrize(
    ("function", "kind", "options"),
    [
        (cross_entropy_loss, CrossEntropy, {}),
        (cross_entropy_loss, CrossEntropy, {"label_smoothing": 0.2, "hard_fraction": 0.3}),
        (cross_entropy_loss, CrossEntropy, {"average": "all"}),
        (focal_loss, Focal, {}),
        (focal_loss, Focal, {"gamma": 0.5, "hard_fraction": 0.3}),
        (focal_loss, Focal, {"average": "all"}),
        (dice_loss, Dice, {}),
        (tversky_loss, Tversky, {}),
        (tversky_loss, Tversky, {"alpha": 1.0, "beta": 0.2}),
        (lovasz_loss, Lovasz, {}),
        (lovasz_loss, Lovasz, {"per_image": True}),
        (cldice_loss, SoftClDice, {}),
        (cldice_loss, SoftClDice, {"iterations": 1, "classes": [0, 2]}),
    ],
)
def test_functions_have_the_value_of_their_training(batch, function, kind, options):
    logits, targets = batch
    prediction = Prediction(logits, (9, 11), (1.0, 1.0), upsample, grid=logits)
    for weights in (WEIGHTS, None, None):  # a loss without weights is cached
        criterion = kind(torch.tensor(weights or [1.0] * 3), **options)
        expected = criterion(prediction, Batch(targets, targets, ["a", "b"]))[0]
        assert torch.equal(function(logits, targets, class_weights=weights, **options), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_types_of_targets_do_not_matter(batch, loss):
    logits, targets = batch
    value = loss(logits, targets)
    for kind in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(loss(logits, targets.to(kind)), value)
    other = torch.where(targets == 255, -100, targets)
    assert torch.equal(loss(logits, other, ignore_index=-100), value)
    assert loss(logits.float(), targets).dtype == torch.float32 == loss(logits.half(), targets).dtype


def test_small_logits_are_upsampled_to_the_targets(batch):
    targets = torch.randint(0, 3, (2, 36, 44), generator=torch.Generator().manual_seed(1))
    large = F.interpolate(batch[0], scale_factor=4, mode="bilinear")
    assert dice_loss(batch[0], targets).item() == pytest.approx(dice_loss(large, targets).item(), abs=1e-9)


def test_masks_of_queries_take_the_loss_of_their_training(batch):
    rng = torch.Generator().manual_seed(0)
    targets = batch[1]
    logits, masks = torch.randn(2, 5, 4, generator=rng), torch.randn(2, 5, 9, 11, generator=rng)
    shares = WeightedMasks(masks, logits.softmax(-1)[..., :3])
    prediction = Prediction(MaskOutputs(logits, masks), (9, 11), (1.0, 1.0), None, mixture=True, masks=shares)
    options = {"num_points": 50, "no_object": 0.2}
    torch.manual_seed(0)
    found = mask_classification_loss(prediction, targets, class_weights=WEIGHTS, **options)
    torch.manual_seed(0)
    criterion = MaskClassification(torch.tensor(WEIGHTS), **options)
    assert torch.equal(found, criterion(prediction, Batch(targets, targets, ["a", "b"]))[0])
    assert cross_entropy_loss(prediction, targets).item() > 0


@pytest.mark.parametrize(
    ("ignored", "interpolation", "size"),
    [
        ("excluded", "nearest", (9, 11)),
        ("excluded", "bilinear", (5, 4)),
        ("background", "nearest", (5, 4)),
        ("background", "bilinear", (9, 11)),
    ],
)
def test_ignored_pixels_and_target_masks_of_queries(monkeypatch, ignored, interpolation, size):
    """One class in each image but the last, which has none; the query of lowest cost is matched."""
    rng = torch.Generator().manual_seed(size[1])
    classes, masks = (torch.randn(3, 4, *shape, dtype=torch.float64, generator=rng) for shape in ((4,), (3, 5)))
    targets = torch.tensor([2, 1, 255])[:, None, None].repeat(1, *size)
    targets[:, torch.rand(size, generator=rng) < 0.5] = 255
    points = torch.rand(1, 30, 2, dtype=torch.float64, generator=rng)
    fix_points(monkeypatch, points)
    shares = WeightedMasks(masks, classes.softmax(-1)[..., :3])
    prediction = Prediction(MaskOutputs(classes, masks), size, (1.0, 1.0), None, mixture=True, masks=shares)
    found = mask_classification_loss(prediction, targets, ignored=ignored, interpolation=interpolation, no_object=0.1)

    weight = torch.tensor([1, 1, 1, 0.1]).double()
    wanted = torch.full((3, 4), 3)
    terms = []
    fading = {"padding_mode": "border" if interpolation == "nearest" else "zeros", "align_corners": False}
    grid = (2 * points - 1)[:, None]  # (1, 1, P, 2)
    for image, label in enumerate((2, 1)):
        read = {"mode": interpolation, "padding_mode": "zeros", "align_corners": False}
        truth, known = (
            F.grid_sample(part.double()[None, None], grid, **read)[0, 0, 0]
            for part in (targets[image] == label, targets[image] != 255)
        )
        known = known if ignored == "excluded" else torch.ones_like(known)
        logits = F.grid_sample(masks[image][None], grid, **fading)[0, :, 0]  # (Q, P)
        truth_share = (truth / known.clamp(min=1e-9)).expand_as(logits)
        entropy = F.binary_cross_entropy_with_logits(logits, truth_share, known.expand_as(logits), reduction="none")
        entropy = entropy.sum(1) / known.sum().clamp(min=1)
        probability = logits.sigmoid()
        dice = 1 - (2 * (probability * truth).sum(1) + 1) / ((probability * known).sum(1) + truth.sum() + 1)
        query = int((5 * entropy + 5 * dice - 2 * classes[image].softmax(-1)[:, label]).argmin())
        wanted[image, query] = label
        terms.append(5 * entropy[query] + 5 * dice[query])
    if ignored == "excluded":
        wanted[2] = -100
    expected = 2 * F.cross_entropy(classes.flatten(0, 1), wanted.flatten(), weight) + torch.stack(terms).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-7)


@pytest.mark.parametrize("fill", [None, 0, 1, 255])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_losses_of_layers_equal_definitions_with_finite_slopes(fill, weights):
    rng = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=rng)
    targets = torch.randint(0, 2, logits.shape, generator=rng)
    targets[torch.rand(targets.shape, generator=rng) < 0.3] = 255
    targets[:, 1] = 0
    targets[0, 1, 2, 3] = 1  # one pixel
    targets = targets if fill is None else torch.full_like(targets, fill)
    cost = norm = dice = present = 0.0
    for layer, weight in enumerate(weights or [1.0] * 3):
        known = targets[:, layer] != 255
        truth = targets[:, layer][known].double()
        share = logits[:, layer][known].sigmoid()
        cost -= weight * (truth * share.log() + (1 - truth) * (1 - share).log()).sum().item()
        norm += weight * known.sum().item()
        if truth.any():
            dice += weight * (1 - 2 * (truth * share).sum() / (truth.sum() + share.sum())).item()
            present += weight
    logits.requires_grad_()
    entropy = bce_loss(logits, targets, class_weights=weights)
    assert entropy.item() == pytest.approx(cost / norm if norm else 0, abs=1e-12)
    overlap = binary_dice_loss(logits, targets.int(), class_weights=weights)
    assert overlap.item() == pytest.approx(dice / present if present else 0, abs=1e-12)
    assert all(torch.autograd.grad(value, logits)[0].isfinite().all() for value in (entropy, overlap))


@pytest.mark.parametrize("loss", [bce_loss, binary_dice_loss])
def test_layers_of_one_class_are_enough_and_any_id_is_ignored(loss):
    logits = torch.randn(2, 3, 4, 4)
    targets = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert loss(logits[:, :1], targets[:, :1]).isfinite()
    assert loss(logits, targets + 2, ignore_index=2) == 0


def test_weights_from_counts_have_a_mean_of_one():
    assert compute_class_weights(torch.tensor([100, 300]), "inverse").tolist() == [1.5, 0.5]
    assert compute_class_weights([5, 0], "none").tolist() == [1, 1]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("wrong", [-1, 3])
def test_targets_outside_the_classes_are_refused(loss, wrong):
    logits = torch.randn(2, 3, 4, 4)
    targets = torch.zeros(2, 4, 4, dtype=torch.int16)
    targets[1, 2, 2] = wrong
    assert_refused(lambda: loss(logits, targets), f"hold the ids [{wrong}], which are neither classes (0..2) nor")
    assert torch.isfinite(loss(logits, targets, ignore_index=wrong))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_softmax_over_one_class_is_refused(loss):
    targets = torch.zeros(2, 4, 4, dtype=torch.int64)
    for weights in (None, [2.0]):
        assert_refused(partial(loss, torch.randn(2, 1, 4, 4), targets, class_weights=weights), "1 class", "two")
    targets[:, 1] = 1
    assert loss(torch.randn(2, 2, 4, 4), targets) > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_trains_after_it_was_used_in_inference_mode(loss):
    targets = torch.randint(5, (1, 4, 4))
    with torch.inference_mode():
        loss(torch.randn(1, 5, 4, 4), targets)
    logits = torch.randn(1, 5, 4, 4, requires_grad=True)
    loss(logits, targets).backward()
    assert logits.grad.abs().sum() > 0


def test_options_may_be_tensors_arrays_and_collections(batch):
    expected = focal_loss(*batch, gamma=1.5)
    for gamma in (torch.tensor(1.5), np.array(1.5), np.float32(1.5)):
        assert focal_loss(*batch, gamma=gamma) == expected
    expected = cldice_loss(*batch, classes=[0, 2])
    for classes in ((2, 0), {0, 2}, range(0, 3, 2), np.array([0, 2]), torch.tensor([0, 2])):
        assert cldice_loss(*batch, classes=classes) == expected
    assert dice_loss(batch[0], torch.full_like(batch[1], 254), ignore_index=np.int64(254)) == 0
