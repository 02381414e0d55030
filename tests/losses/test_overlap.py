"""Focal, dice, Tversky and Lovasz against loops over pixels in float64, written from their definitions."""

import functools
import itertools
import math

import pytest
import torch

from dinoseg.core.geometry import upsample, valid_share
from dinoseg.core.shapes import Batch, MaskOutputs, Prediction
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.focal import Focal
from dinoseg.losses.lovasz import Lovasz, lovasz_softmax
from dinoseg.losses.overlap import Dice, Tversky
from dinoseg.utils.errors import UserError

WEIGHTS = torch.tensor([0.25, 1.0, 3.0, 0.5])
EVERY = [CrossEntropy, Focal, Dice, Tversky, Lovasz]
PER_CLASS = [Dice, Tversky, Lovasz]


def make(mask, dtype=torch.float64, grid=(3, 4), seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(len(mask), 4, *grid, dtype=torch.float64, generator=generator)
    logits = logits.to(dtype).requires_grad_()
    image = (8 * grid[0] - 3, 8 * grid[1] - 5)
    prediction = Prediction(logits, image, valid_share(image, 8), upsample)
    return prediction, Batch(torch.zeros(len(mask), 3, *image, dtype=torch.uint8), mask, [""] * len(mask))


def on_the_grid(mask):
    """Predict one score per label pixel, so that each pixel's part can be told."""
    logits = torch.randn(len(mask), 4, *mask.shape[1:], dtype=torch.float64, requires_grad=True)
    prediction = Prediction(logits, tuple(mask.shape[1:]), (1.0, 1.0), upsample)
    return prediction, Batch(torch.zeros(len(mask), 3, *mask.shape[1:], dtype=torch.uint8), mask, [""] * len(mask))


def random_mask(shape, seed, classes=(0, 1, 2, 3), ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor(classes)[torch.randint(0, len(classes), shape, generator=generator)].to(torch.uint8)
    mask[torch.rand(shape, generator=generator) < ignored] = 255
    return mask


MASKS = {
    "many": random_mask((2, 20, 29), 0),
    "small": random_mask((3, 7, 5), 1),
    "tall": random_mask((1, 41, 3), 2),
    "two classes": random_mask((2, 9, 8), 3, classes=(1, 3)),
    "all labelled": random_mask((2, 6, 6), 4, ignored=0.0),
    "one class": torch.full((1, 4, 5), 2, dtype=torch.uint8),
    "one pixel": torch.tensor([[[3]]], dtype=torch.uint8),
    "one pixel labelled": torch.tensor([[[255, 255], [255, 1]]], dtype=torch.uint8),
    "one image without labels": torch.stack([torch.full((5, 6), 255), torch.arange(30).reshape(5, 6) % 4]).byte(),
}


def pixels(prediction, mask):
    """List (class shares, label, image) of the labelled pixels."""
    scores = prediction.logits(tuple(mask.shape[1:])).detach().double()
    found = []
    for b, y, x in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        if mask[b, y, x] != 255:
            powers = [math.exp(v) for v in scores[b, :, y, x].tolist()]
            found.append(([power / sum(powers) for power in powers], int(mask[b, y, x]), b))
    return found


def focal_by_hand(found, gamma, weights):
    total = sum(weights[k] * (1 - shares[k]) ** gamma * -math.log(shares[k]) for shares, k, _ in found)
    return total / sum(weights[k] for _, k, _ in found)


def tversky_by_hand(found, alpha, beta, weights):
    total = norm = 0.0
    for k in {label for _, label, _ in found}:
        true_positive = sum(shares[k] for shares, label, _ in found if label == k)
        false_positive = sum(shares[k] for shares, label, _ in found if label != k)
        false_negative = sum(1 - shares[k] for shares, label, _ in found if label == k)
        index = true_positive / (true_positive + alpha * false_positive + beta * false_negative)
        total, norm = total + weights[k] * (1 - index), norm + weights[k]
    return total / norm


def dice_by_hand(found, weights):
    total = norm = 0.0
    for k in {label for _, label, _ in found}:
        both = sum(shares[k] * (label == k) for shares, label, _ in found)
        sizes = sum(shares[k] + (label == k) for shares, label, _ in found)
        total, norm = total + weights[k] * (1 - 2 * both / sizes), norm + weights[k]
    return total / norm


def jaccard_loss(wrong, own):
    """Return 1 - IoU of a class whose pixels are `own`, when the pixels `wrong` are predicted wrongly."""
    return len(wrong & own) / len(own | wrong) + len(wrong - own) / len(own | wrong)


def lovasz_by_levels(found, weights):
    """Integrate the Jaccard loss of the pixels whose error is at least t, over t from 0 to 1."""
    total = norm = 0.0
    for k in {label for _, label, _ in found}:
        errors = [1 - shares[k] if label == k else shares[k] for shares, label, _ in found]
        own = {i for i, (_, label, _) in enumerate(found) if label == k}
        levels = sorted({0.0, *errors})
        value = sum(
            (high - low) * jaccard_loss({i for i, error in enumerate(errors) if error >= high}, own)
            for low, high in itertools.pairwise(levels)
        )
        total, norm = total + weights[k] * value, norm + weights[k]
    return total / norm


def check(value, expected, dtype):
    assert value.dtype == dtype
    assert value.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MASKS)
class TestAgainstLoops:
    def test_focal_equals_its_formula(self, name, dtype):
        prediction, batch = make(MASKS[name], dtype)
        for gamma in (0.0, 0.5, 2.0):
            value, parts = Focal(WEIGHTS, gamma=gamma)(prediction, batch)
            found = pixels(prediction, batch.mask)
            check(value, focal_by_hand(found, gamma, WEIGHTS.tolist()), dtype)
            check(parts["weight"], sum(WEIGHTS[k].item() for _, k, _ in found), dtype)

    def test_dice_and_tversky_equal_their_formulas(self, name, dtype):
        prediction, batch = make(MASKS[name], dtype)
        found = pixels(prediction, batch.mask)
        value, parts = Dice(WEIGHTS)(prediction, batch)
        check(value, dice_by_hand(found, WEIGHTS.tolist()), dtype)
        check(parts["weight"], len({image for _, _, image in found}), dtype)
        for alpha, beta in ((0.3, 0.7), (1.0, 1.0), (0.0, 0.2)):
            value, parts = Tversky(WEIGHTS, alpha=alpha, beta=beta)(prediction, batch)
            check(value, tversky_by_hand(found, alpha, beta, WEIGHTS.tolist()), dtype)
            check(parts["weight"], len({image for _, _, image in found}), dtype)

    def test_lovasz_equals_its_formula(self, name, dtype):
        prediction, batch = make(MASKS[name], dtype)
        found = pixels(prediction, batch.mask)
        images = sorted({image for _, _, image in found})
        value, parts = Lovasz(WEIGHTS)(prediction, batch)
        check(value, lovasz_by_levels(found, WEIGHTS.tolist()), dtype)
        check(parts["weight"], len(images), dtype)
        value, parts = Lovasz(WEIGHTS, per_image=True)(prediction, batch)
        each = [lovasz_by_levels([f for f in found if f[2] == image], WEIGHTS.tolist()) for image in images]
        check(value, sum(each) / len(each), dtype)
        check(parts["weight"], len(images), dtype)


def test_lovasz_is_the_highest_sum_over_all_orders_of_the_pixels():
    """For a submodular loss the extension is a maximum over permutations (Edmonds)."""
    generator = torch.Generator().manual_seed(0)
    for target in ([0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]):
        shares = torch.rand(6, 2, dtype=torch.float64, generator=generator)
        shares = shares / shares.sum(1, keepdim=True)
        total = 0.0
        for k in set(target):
            own = {i for i in range(6) if target[i] == k}
            errors = [float(1 - shares[i, k] if i in own else shares[i, k]) for i in range(6)]
            total += max(
                sum(
                    errors[i]
                    * (jaccard_loss(set(order[: n + 1]), own) - (jaccard_loss(set(order[:n]), own) if n else 0))
                    for n, i in enumerate(order)
                )
                for order in itertools.permutations(range(6))
            ) / len(set(target))
        value = lovasz_softmax(shares, torch.tensor(target), torch.ones(2, dtype=torch.float64))
        assert value.item() == pytest.approx(total, rel=1e-12)


def test_lovasz_of_sure_predictions_is_one_minus_iou():
    mask = torch.tensor([[[0, 0, 0, 1], [1, 2, 2, 255]]], dtype=torch.uint8)
    said = torch.tensor([[[0, 0, 1, 1], [1, 2, 0, 3]]])
    logits = 200.0 * torch.nn.functional.one_hot(said, 4).movedim(-1, 1).double()
    prediction = Prediction(logits, (2, 4), (1.0, 1.0), upsample)
    batch = Batch(torch.zeros(1, 3, 2, 4), mask, [""])
    value, _ = Lovasz(torch.ones(4))(prediction, batch)
    assert value.item() == pytest.approx(1 - (2 / 4 + 2 / 3 + 1 / 2) / 3, rel=1e-12)


def test_lovasz_keeps_its_digits_on_many_pixels():
    shares = torch.rand(200_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = shares / shares.sum(1, keepdim=True)
    target = (torch.arange(len(shares)) % 3 == 0).long()
    exact = lovasz_softmax(shares, target, torch.ones(2, dtype=torch.float64))
    single = lovasz_softmax(shares.float(), target, torch.ones(2))
    assert single.item() == pytest.approx(exact.item(), rel=1e-6)


def test_special_cases_of_tversky_and_focal_equal_others():
    prediction, batch = make(MASKS["many"])
    same = Tversky(WEIGHTS, alpha=0.5, beta=0.5)(prediction, batch)[0]
    torch.testing.assert_close(Dice(WEIGHTS)(prediction, batch)[0], same)
    torch.testing.assert_close(
        Focal(WEIGHTS, gamma=0.0)(prediction, batch)[0], CrossEntropy(WEIGHTS)(prediction, batch)[0]
    )


@pytest.mark.parametrize("loss", EVERY)
def test_the_ignore_value_may_be_any(loss):
    mask = random_mask((2, 6, 7), 9)
    prediction, batch = make(mask)
    expected = loss(WEIGHTS)(prediction, batch)[0]
    batch.mask = mask.where(mask != 255, 17)
    torch.testing.assert_close(loss(WEIGHTS, ignore_index=17)(prediction, batch)[0], expected)
    first_ignored = mask.where(mask != 0, 255)
    batch.mask = first_ignored
    expected = loss(WEIGHTS)(prediction, batch)[0]
    batch.mask = first_ignored.where(first_ignored != 255, 0)
    torch.testing.assert_close(loss(WEIGHTS, ignore_index=0)(prediction, batch)[0], expected)


@pytest.mark.parametrize("loss", EVERY)
def test_only_classes_without_weight_give_zero(loss):
    prediction, batch = make(torch.full((1, 6, 5), 2, dtype=torch.uint8), torch.float32)
    value, _ = loss(torch.tensor([1.0, 1.0, 0.0, 1.0]))(prediction, batch)
    value.backward()
    assert value.item() == 0 and bool((prediction.outputs.grad == 0).all())


@pytest.mark.parametrize("loss", [*EVERY, lambda weights: Focal(weights, gamma=0.5)])
@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_sure_predictions_right_or_wrong_give_finite_gradients(loss, scale):
    prediction, batch = make(MASKS["many"], torch.float32, scale=scale)
    value, _ = loss(WEIGHTS)(prediction, batch)
    value.backward()
    assert value.isfinite() and bool(prediction.outputs.grad.isfinite().all())


@pytest.mark.parametrize("loss", EVERY)
def test_class_weights_matter_and_their_scale_does_not(loss):
    prediction, batch = make(MASKS["many"])
    value = loss(WEIGHTS)(prediction, batch)[0]
    torch.testing.assert_close(loss(7 * WEIGHTS)(prediction, batch)[0], value)
    assert abs(loss(torch.ones(4))(prediction, batch)[0] - value) > 1e-3


@pytest.mark.parametrize("loss", PER_CLASS)
def test_absent_class_counts_only_where_it_is_predicted(loss):
    mask = torch.zeros(1, 4, 4, dtype=torch.uint8)
    sure = torch.full((1, 4, 4, 4), -50.0)
    sure[:, 0] = 50.0
    value, _ = loss(torch.ones(4))(Prediction(sure, (4, 4), (1.0, 1.0), upsample), Batch(mask, mask, [""]))
    assert value.item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("loss", EVERY)
def test_overlap_losses_work_with_mask_heads(loss):
    """A mixture's scores enter as log-probabilities, so the shares are the scores divided by their sum."""
    masks = torch.randn(2, 5, 3, 4, requires_grad=True)
    outputs = MaskOutputs(torch.randn(2, 5, 5), masks)

    def to_pixels(outputs, size, valid):
        classes = outputs.class_logits.softmax(-1)[..., :-1]
        return torch.einsum("bqk,bqhw->bkhw", classes, upsample(outputs.mask_logits, size, valid).sigmoid())

    batch = Batch(torch.zeros(2, 3, 6, 8), random_mask((2, 6, 8), 3), ["", ""])
    prediction = Prediction(outputs, (6, 8), (1.0, 1.0), to_pixels, mixture=True)
    value, _ = loss(WEIGHTS)(prediction, batch)
    value.backward()
    same = Prediction(prediction.scores().log().detach(), (6, 8), (1.0, 1.0), upsample)
    torch.testing.assert_close(value, loss(WEIGHTS)(same, batch)[0])
    assert masks.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "make_loss, said",
    [
        (lambda: Focal(WEIGHTS, gamma=-0.1), "^gamma=-0.1 is out of range. Give a number of at least 0"),
        (lambda: Focal(WEIGHTS, gamma=math.nan), "^gamma=nan is out of range"),
        (lambda: Tversky(WEIGHTS, alpha=-1.0), "^alpha=-1.0 .* at least 0"),
        (lambda: Tversky(WEIGHTS, beta=0.0), "^beta=0.0 .* above 0"),
    ],
)
def test_bad_options_are_refused(make_loss, said):
    with pytest.raises(UserError, match=said):
        make_loss()


@pytest.mark.parametrize("loss", [*EVERY, functools.partial(Lovasz, per_image=True)])
def test_only_losses_that_sum_over_a_batch_change_when_split(loss):
    loss = loss(WEIGHTS)
    mask = random_mask((2, 8, 9), 5)
    mask[1, :5] = 255
    prediction, batch = on_the_grid(mask)
    whole, parts = loss(prediction, batch)
    alone = [loss(prediction.of_images(slice(place, place + 1)), part) for place, part in enumerate(batch.split(2))]
    mean = sum(value * part["weight"] for value, part in alone) / parts["weight"]
    assert loss.sums_over_batch == (abs(mean - whole) > 1e-6 * whole)
