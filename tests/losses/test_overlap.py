"""Lovasz against its definitions in float64, and what losses of class scores have in common."""

import itertools

import pytest
import torch

from dinoseg.core.geometry import upsample, valid_share
from dinoseg.core.shapes import Batch, MaskOutputs, Prediction
from dinoseg.losses.cross_entropy import CrossEntropy
from dinoseg.losses.focal import Focal
from dinoseg.losses.lovasz import Lovasz
from dinoseg.losses.overlap import Dice, Tversky

WEIGHTS = torch.tensor([0.25, 1.0, 3.0, 0.5])
EVERY = [CrossEntropy, Focal, Dice, Tversky, Lovasz]


def make(mask, dtype=torch.float64, grid=(3, 4), seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(len(mask), 4, *grid, dtype=torch.float64, generator=generator)
    logits = logits.to(dtype).requires_grad_()
    image = (8 * grid[0] - 3, 8 * grid[1] - 5)
    prediction = Prediction(logits, image, valid_share(image, 8), upsample)
    return prediction, Batch(torch.zeros(len(mask), 3, *image, dtype=torch.uint8), mask, [""] * len(mask))


def random_mask(shape, seed, classes=(0, 1, 2, 3), ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor(classes)[torch.randint(0, len(classes), shape, generator=generator)].to(torch.uint8)
    mask[torch.rand(shape, generator=generator) < ignored] = 255
    return mask


MASKS = {
    "many": random_mask((2, 9, 11), 0),
    "small": random_mask((3, 7, 5), 1),
    "tall": random_mask((1, 23, 3), 2),
    "two classes": random_mask((2, 9, 8), 3, classes=(1, 3)),
    "all labelled": random_mask((2, 6, 6), 4, ignored=0.0),
    "one class": torch.full((1, 4, 5), 2, dtype=torch.uint8),
    "one pixel": torch.tensor([[[3]]], dtype=torch.uint8),
    "one pixel labelled": torch.tensor([[[255, 255], [255, 1]]], dtype=torch.uint8),
    "one image without labels": torch.stack([torch.full((5, 6), 255), torch.arange(30).reshape(5, 6) % 4]).byte(),
}


def pixels(prediction, mask):
    """List (class shares, label, image) of the labelled pixels."""
    shares = prediction.logits(tuple(mask.shape[1:])).detach().double().softmax(1).movedim(1, -1)
    known = (mask != 255).nonzero().tolist()
    return [(shares[b, y, x].tolist(), int(mask[b, y, x]), b) for b, y, x in known]


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


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float64) for name in MASKS), ("many", torch.float32), ("one pixel labelled", torch.float32)],
)
def test_lovasz_equals_its_formula(name, dtype):
    prediction, batch = make(MASKS[name], dtype)
    found = pixels(prediction, batch.mask)
    weights = WEIGHTS.tolist()
    images = sorted({image for _, _, image in found})
    each = [lovasz_by_levels([pixel for pixel in found if pixel[2] == image], weights) for image in images]
    for per_image, expected in ((False, lovasz_by_levels(found, weights)), (True, sum(each) / len(each))):
        value, parts = Lovasz(WEIGHTS, per_image=per_image)(prediction, batch)
        assert value.dtype == dtype and parts["weight"] == len(images)
        assert value.item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize(("margin", "rel"), [(7.0, 1e-4), (0.0, 1e-6)], ids=["confident", "noise"])
@pytest.mark.parametrize("loss", EVERY)
def test_float32_is_exact_on_many_pixels(loss, margin, rel):
    # of a confident model, a running sum in float32 rounds each share up to 1, and 1 - p loses digits
    mask = (torch.arange(1000 * 1000).view(1, 1000, 1000) % 3 == 0).byte()
    noise = torch.randn(1, 2, 1000, 1000, generator=torch.Generator().manual_seed(0)) / 2
    logits = torch.zeros_like(noise).scatter_(1, mask[:, None].long(), margin) + noise
    single, exact = (
        loss(torch.ones(2))(Prediction(scores, (1000, 1000), (1.0, 1.0), upsample), Batch(mask, mask, [""]))[0].item()
        for scores in (logits, logits.double())
    )
    assert single == pytest.approx(exact, rel=rel)


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


@pytest.mark.parametrize("loss", [*(loss(WEIGHTS) for loss in EVERY), Lovasz(WEIGHTS, per_image=True)])
def test_only_losses_that_sum_over_a_batch_change_when_split(loss):
    mask = random_mask((2, 8, 9), 5)
    mask[1, :5] = 255
    logits = torch.randn(2, 4, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prediction = Prediction(logits, (8, 9), (1.0, 1.0), upsample)
    batch = Batch(mask, mask, ["", ""])
    whole, parts = loss(prediction, batch)
    alone = [loss(prediction.of_images(slice(place, place + 1)), part) for place, part in enumerate(batch.split(2))]
    mean = sum(value * part["weight"] for value, part in alone) / parts["weight"]
    assert loss.sums_over_batch == (abs(mean - whole) > 1e-6 * whole)
