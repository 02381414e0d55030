"""Losses on tensors: equal to references in float64, to those of torch, and to the classes of a training."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dinoseg
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
    mask_classification,
    mask_classification_loss,
    tversky_loss,
)
from dinoseg.losses.cldice import SoftClDice
from dinoseg.losses.mask_classification import MaskClassification
from dinoseg.utils.errors import UserError

WEIGHTS = [0.5, 2.0, 1.0]
LOSSES = (cross_entropy_loss, focal_loss, dice_loss, tversky_loss, lovasz_loss, cldice_loss)


@pytest.fixture
def batch():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 9, 11, dtype=torch.float64, generator=rng)
    targets = torch.randint(0, 3, (2, 9, 11), generator=rng)
    targets[:, :2] = 255
    return logits, targets


def overlap(logits, targets, alpha, beta, weights):
    """Return the Tversky loss by its definition."""
    known = targets != 255
    shares, total, norm = logits.softmax(1).movedim(1, -1)[known], 0.0, 0.0
    for k, weight in enumerate(weights):
        truth, share = (targets[known] == k).double(), shares[:, k]
        hits, false, missed = (share * truth).sum(), (share * (1 - truth)).sum(), ((1 - share) * truth).sum()
        total, norm = total + weight * (1 - hits / (hits + alpha * false + beta * missed)), norm + weight
    return total / norm


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_values_are_those_of_their_definitions(batch, weights):
    logits, targets = batch
    known, of_class = targets != 255, torch.tensor(weights or [1.0] * 3, dtype=torch.float64)
    given = {"class_weights": weights}
    expected = F.cross_entropy(logits, targets, of_class, ignore_index=255)
    assert cross_entropy_loss(logits, targets, **given).item() == pytest.approx(expected.item(), abs=1e-12)
    smooth = F.cross_entropy(logits, targets, of_class, ignore_index=255, label_smoothing=0.2)
    assert cross_entropy_loss(logits, targets, label_smoothing=0.2, **given).item() == pytest.approx(smooth.item())
    costs = F.cross_entropy(logits, targets, ignore_index=255, reduction="none")[known]
    of_pixel = of_class[targets[known]]
    focal = (of_pixel * (1 - (-costs).exp()) ** 2 * costs).sum() / of_pixel.sum()
    assert focal_loss(logits, targets, **given).item() == pytest.approx(focal.item(), abs=1e-12)
    for alpha, beta in ((0.3, 0.7), (1.0, 1.0)):
        found = tversky_loss(logits, targets, alpha=alpha, beta=beta, **given)
        assert found.item() == pytest.approx(overlap(logits, targets, alpha, beta, of_class).item(), abs=1e-12)
    dice = overlap(logits, targets, 0.5, 0.5, of_class)
    assert dice_loss(logits, targets, **given).item() == pytest.approx(dice.item(), abs=1e-12)


def costs_of_pixels(loss, logits, targets):
    costs = F.cross_entropy(logits, targets, ignore_index=255, reduction="none")
    return (1 - (-costs).exp()) ** 2 * costs if loss is focal_loss else costs


@pytest.mark.parametrize("loss", [cross_entropy_loss, focal_loss])
def test_hard_pixels_have_the_highest_loss_of_each_image(batch, loss):
    costs = costs_of_pixels(loss, *batch).flatten(1)
    hardest = [row[row > 0].topk(math.ceil(0.25 * int((row > 0).sum()))).values for row in costs]
    assert loss(*batch, hard_fraction=0.25).item() == pytest.approx(torch.cat(hardest).mean().item(), abs=1e-12)


def test_lovasz_of_hard_predictions_is_one_minus_iou():
    targets = torch.tensor([[[0, 0, 1, 1], [0, 1, 1, 255]]])
    predicted = torch.tensor([[[0, 1, 1, 1], [0, 0, 1, 1]]])
    logits = 1e4 * F.one_hot(predicted, 2).movedim(-1, 1).double()
    # of class 0: 2 of 4, of class 1: 3 of 5 pixels
    assert lovasz_loss(logits, targets).item() == pytest.approx(1 - (2 / 4 + 3 / 5) / 2)


@pytest.mark.parametrize("size", [(9, 11), (1, 7), (13, 2)])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_means_over_all_pixels_divide_by_ignored_ones_too(size, weights):
    rng = torch.Generator().manual_seed(size[0])
    of_class = torch.tensor(weights or [1.0] * 3, dtype=torch.float64)
    for _ in range(3):
        logits = 2 * torch.randn(2, 3, *size, dtype=torch.float64, generator=rng)
        targets = torch.randint(0, 3, (2, *size), generator=rng)
        targets[torch.rand(targets.shape, generator=rng) < 0.4] = 255
        options = {"average": "all", "class_weights": weights}
        expected = F.cross_entropy(logits, targets, of_class, ignore_index=255, reduction="none").mean()
        assert cross_entropy_loss(logits, targets, **options).item() == pytest.approx(expected.item(), rel=1e-12)
        smooth = F.cross_entropy(logits, targets, of_class, ignore_index=255, reduction="none", label_smoothing=0.1)
        found = cross_entropy_loss(logits, targets, label_smoothing=0.1, **options)
        assert found.item() == pytest.approx(smooth.mean().item(), rel=1e-12)
        costs = F.cross_entropy(logits, targets, ignore_index=255, reduction="none")
        focal = of_class[targets.where(targets != 255, 0)] * (1 - (-costs).exp()) ** 1.5 * costs
        assert focal_loss(logits, targets, gamma=1.5, **options).item() == pytest.approx(focal.mean().item(), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_right_and_types_do_not_matter(batch, loss):
    logits, targets = (part[:, ..., :5, :4] for part in batch)
    logits = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda each: loss(each, targets), logits)
    value = loss(logits, targets)
    for kind in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(loss(logits, targets.to(kind)), value)
    other = torch.where(targets == 255, -100, targets)
    assert torch.equal(loss(logits, other, ignore_index=-100), value)
    assert loss(logits.float(), targets).dtype == torch.float32 == loss(logits.half(), targets).dtype


@pytest.mark.parametrize("loss", LOSSES)
def test_no_label_gives_zero_and_no_gradient(batch, loss):
    logits = batch[0].clone().requires_grad_()
    value = loss(logits, torch.full_like(batch[1], 255))
    value.backward()
    assert value.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_small_logits_are_upsampled_to_the_targets(batch, loss):
    logits, _ = batch
    targets = torch.randint(0, 3, (2, 36, 44), generator=torch.Generator().manual_seed(1))
    large = F.interpolate(logits, scale_factor=4, mode="bilinear")
    assert loss(logits, targets).item() == pytest.approx(loss(large, targets).item(), abs=1e-9)


def test_masks_of_queries_take_the_loss_of_their_training(batch):
    rng, targets = torch.Generator().manual_seed(0), batch[1]
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
    with pytest.raises(UserError, match="as_prediction=True"):
        mask_classification_loss(batch[0], targets)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("ignored", ["excluded", "background"])
@pytest.mark.parametrize("size", [(9, 11), (5, 4)])
def test_ignored_pixels_and_target_masks_of_queries(monkeypatch, ignored, interpolation, size):
    """One class in each image but the last, which has none; the query of lowest cost is matched."""
    rng = torch.Generator().manual_seed(size[1])
    classes, masks = (torch.randn(3, 4, *shape, dtype=torch.float64, generator=rng) for shape in ((4,), (3, 5)))
    targets = torch.tensor([2, 1, 255])[:, None, None].repeat(1, *size)
    targets[:, torch.rand(size, generator=rng) < 0.5] = 255
    points = torch.rand(1, 30, 2, dtype=torch.float64, generator=rng)
    for name in ("random_points", "uncertain_points"):
        monkeypatch.setattr(mask_classification, name, lambda first, *_, **__: every_point(points, first))
    shares = WeightedMasks(masks, classes.softmax(-1)[..., :3])
    prediction = Prediction(MaskOutputs(classes, masks), size, (1.0, 1.0), None, mixture=True, masks=shares)
    found = mask_classification_loss(prediction, targets, ignored=ignored, interpolation=interpolation, no_object=0.1)

    weight, wanted, terms = torch.tensor([1, 1, 1, 0.1]).double(), torch.full((3, 4), 3), []
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


def every_point(points, first):
    """Return the same points for each of `first`, a number of images or the masks themselves."""
    return points.expand(first if isinstance(first, int) else len(first), -1, -1)


@pytest.mark.parametrize("fill", [None, 0, 1, 255])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_losses_of_layers_equal_their_definitions(fill, weights):
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
        truth, share = targets[:, layer][known].double(), logits[:, layer][known].sigmoid()
        cost -= weight * (truth * share.log() + (1 - truth) * (1 - share).log()).sum().item()
        norm += weight * known.sum().item()
        if truth.any():
            dice += weight * (1 - 2 * (truth * share).sum() / (truth.sum() + share.sum())).item()
            present += weight
    found = bce_loss(logits, targets, class_weights=weights)
    assert found.item() == pytest.approx(cost / norm if norm else 0, abs=1e-12)
    found = binary_dice_loss(logits, targets.int(), class_weights=weights)
    assert found.item() == pytest.approx(dice / present if present else 0, abs=1e-12)


@pytest.mark.parametrize("loss", [bce_loss, binary_dice_loss])
def test_layers_that_do_not_fit_are_refused(loss):
    logits, targets = torch.randn(2, 3, 4, 4), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert loss(logits[:, :1], targets[:, :1]).isfinite()  # one class is enough
    for wrong, message in (
        (targets[:, 0], r"\[2, 4, 4\]. Give a layer for each class \(B, K, H, W\)"),
        (targets.float(), "Give a layer for each class"),
        (targets[:, :2], "have 2 layers, and the logits 3"),
        (targets + 2, r"hold the ids \[2\], which are neither"),
        (targets[:1], "There are 2 logits and 1 targets"),
    ):
        with pytest.raises(UserError, match=message):
            loss(logits, wrong)
    assert loss(logits, targets + 2, ignore_index=2) == 0
    for ignored in (0, 1):  # would leave out all pixels of a class, or all others
        with pytest.raises(UserError, match=f"ignore_index={ignored}: layers hold 0 and 1"):
            loss(logits, targets, ignore_index=ignored)


def test_cldice_has_the_value_of_its_training(batch):
    logits, targets = batch
    prediction = Prediction(logits, (9, 11), (1.0, 1.0), None, grid=logits)
    for options in ({}, {"iterations": 1, "classes": [0, 2]}):
        criterion = SoftClDice(torch.tensor(WEIGHTS), **options)
        expected = criterion(prediction, Batch(targets, targets, ["a", "b"]))[0]
        assert torch.equal(cldice_loss(logits, targets, class_weights=WEIGHTS, **options), expected)
        assert torch.equal(cldice_loss(logits, targets, class_weights=WEIGHTS, **options), expected)
    expected = cldice_loss(logits, targets, classes=[0, 2])
    for classes in ((2, 0), {0, 2}, range(0, 3, 2), np.array([0, 2]), torch.tensor([0, 2])):
        assert cldice_loss(logits, targets, classes=classes) == expected
    with pytest.raises(UserError, match="classes=.*7.*give ids of classes, from 0 to 2"):
        cldice_loss(logits, targets, classes=[7])
    for classes in (1, "12", [True], np.array(1)):
        with pytest.raises(UserError, match="classes=.* Give a list of whole numbers"):
            cldice_loss(logits, targets, classes=classes)


def test_weights_from_counts_have_a_mean_of_one():
    assert compute_class_weights(torch.tensor([100, 300]), "inverse").tolist() == [1.5, 0.5]
    assert compute_class_weights([5, 0], "none").tolist() == [1, 1]
    with pytest.raises(UserError, match="^scheme=most is unknown"):
        compute_class_weights([1, 2], "most")


@pytest.mark.parametrize("counts", [[10.9, 1.9], [-1, 5], [1, float("nan")], {0: 900, 1: 100}, torch.tensor([0.5, 3])])
def test_counts_of_classes_are_whole_numbers(counts):
    with pytest.raises(UserError, match="^counts: give a whole number"):
        compute_class_weights(counts)
    assert compute_class_weights(torch.tensor([9.0, 1.0]), "inverse").tolist() == pytest.approx([0.2, 1.8])


@pytest.mark.parametrize("value", ["no", 1, None])
def test_per_image_of_lovasz_is_true_or_false(value):
    with pytest.raises(UserError, match="^per_image="):
        dinoseg.losses.lovasz_loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long), per_image=value)


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
        ((2, 3, 4), (2, 4, 4), {}, r"The logits are torch.float32 \[2, 3, 4\]. Give floats"),
        ((2, 3, 4, 4), (2, 1, 4, 4), {}, r"The targets are torch.int64 \[2, 1, 4, 4\]. Give class ids.*bce_loss take"),
        ((2, 3, 4, 4), (1, 4, 4), {}, "There are 2 logits and 1 targets"),
        ((2, 3, 4, 4), (2, 4, 4), {"class_weights": [1.0]}, r"class_weights has the shape \[1\]. Give one .*: 3"),
        ((2, 3, 4, 4), (2, 4, 4), {"hard_fraction": 0.0}, "^hard_fraction=0.0 is out of range. Give"),
        ((2, 3, 4, 4), (2, 4, 4), {"label_smoothing": 1.0}, "^label_smoothing=1.0 is out of range. Give"),
        ((1, 2, 3, 3), (1, 3, 3), {"average": "known"}, "^average=known is unknown. Choose one of labelled, all"),
        ((1, 2, 3, 3), (1, 3, 3), {"average": "all", "hard_fraction": 0.5}, "^average=all and hard_fraction=0.5"),
    ],
)
def test_mistakes_are_refused(logits, targets, options, message):
    with pytest.raises(UserError, match=message):
        cross_entropy_loss(torch.zeros(logits), torch.zeros(targets, dtype=torch.int64), **options)
    with pytest.raises(UserError, match="Give class ids"):
        cross_entropy_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3))


LOSSES = ("cross_entropy_loss", "focal_loss", "dice_loss", "tversky_loss", "lovasz_loss", "cldice_loss")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("wrong", [-1, -100, 3, 254])
def test_targets_outside_the_classes_are_refused(name, wrong):
    loss, logits = getattr(dinoseg.losses, name), torch.randn(2, 3, 4, 4)
    targets = torch.zeros(2, 4, 4, dtype=torch.int16)
    targets[1, 2, 2] = wrong
    with pytest.raises(UserError, match=rf"hold the ids \[{wrong}\], which are neither classes \(0..2\) nor"):
        loss(logits, targets)
    assert torch.isfinite(loss(logits, targets, ignore_index=wrong))


@pytest.mark.parametrize("name", LOSSES)
def test_a_softmax_over_one_class_is_refused(name):
    loss, targets = getattr(dinoseg.losses, name), torch.zeros(2, 4, 4, dtype=torch.int64)
    for weights in (None, [2.0]):
        with pytest.raises(UserError, match="1 class.*two"):
            loss(torch.randn(2, 1, 4, 4), targets, class_weights=weights)
    targets[:, 1] = 1
    assert loss(torch.randn(2, 2, 4, 4), targets) > 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_trains_after_it_was_used_in_inference_mode(name):
    loss = getattr(dinoseg.losses, name)
    targets = torch.randint(5, (1, 4, 4))
    with torch.inference_mode():
        loss(torch.randn(1, 5, 4, 4), targets)
    logits = torch.randn(1, 5, 4, 4, requires_grad=True)
    loss(logits, targets).backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("weights", [[1.0, -1.0, 1.0], [1.0, float("nan"), 1.0], [0, 0, 0]])
def test_class_weights_are_finite_and_not_negative(weights):
    with pytest.raises(UserError, match="class_weights=.*give finite numbers of at least 0, one of them above 0"):
        dinoseg.losses.dice_loss(torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long), class_weights=weights)


def test_each_image_of_a_query_head_needs_targets():
    model = dinoseg.create_model("tiny", head="eomt", num_classes=2, weights="random")
    prediction = model(torch.rand(2, 3, 32, 32), as_prediction=True)
    with pytest.raises(UserError, match="There are 2 logits and 1 targets"):
        dinoseg.losses.cross_entropy_loss(prediction, torch.zeros(1, 32, 32, dtype=torch.long))


def test_targets_are_tensors():
    with pytest.raises(UserError, match="The targets are ndarray. Give a tensor"):
        dinoseg.losses.dice_loss(torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4).long().numpy())
    with pytest.raises(UserError, match=r"The targets are \[0, 4, 4\]: an empty batch. Give at least one image"):
        dinoseg.losses.dice_loss(torch.randn(0, 3, 4, 4), torch.zeros(0, 4, 4).long())
    logits, targets = torch.randn(1, 3, 4, 4), torch.full((1, 4, 4), 254)
    assert dinoseg.losses.dice_loss(logits, targets, ignore_index=np.int64(254)) == 0
    with pytest.raises(UserError, match="ignore_index=None: give a whole number"):
        dinoseg.losses.dice_loss(torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4).long(), ignore_index=None)


def test_options_are_single_values():
    logits, targets = torch.randn(1, 3, 4, 5), torch.randint(0, 3, (1, 4, 5))
    expected = focal_loss(logits, targets, gamma=1.5)
    for gamma in (torch.tensor(1.5), np.array(1.5), np.float32(1.5)):
        assert focal_loss(logits, targets, gamma=gamma) == expected
    for gamma, kind in (([1.5], "list"), ((1, 2), "tuple"), (torch.ones(2), "Tensor"), (np.ones(1), "ndarray")):
        with pytest.raises(UserError, match=rf"gamma=.* is of type {kind}\. Give a single value\."):
            focal_loss(logits, targets, gamma=gamma)
    with pytest.raises(UserError, match=r"average=\['all'\] is of type list"):
        cross_entropy_loss(logits, targets, average=["all"])
