"""Mask classification against loops over points, queries and permutations, in float64."""

import itertools
import math

import pytest
import torch
from mistakes import assert_refused

from dinoseg.core.geometry import upsample, valid_share
from dinoseg.core.shapes import Batch, MaskOutputs, Prediction, collect_tensors
from dinoseg.losses import mask_classification
from dinoseg.losses.mask_classification import FACTORS, MaskClassification

K = 3
WEIGHTS = torch.tensor([0.25, 1.0, 3.0])
ORIGINAL = {"ignored": "background", "interpolation": "bilinear"}


def make_outputs(images, queries=5, grid=(3, 4), columns=K + 1, aux=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    layers = [MaskOutputs(draw(images, queries, columns), draw(images, queries, *grid)) for _ in range(1 + aux)]
    return MaskOutputs(layers[0].class_logits, layers[0].mask_logits, layers[1:])


def make(mask, image=(20, 29), **options):
    outputs = make_outputs(len(mask), **options)
    prediction = Prediction(outputs, image, valid_share(image, 8), semantic, mixture=True)
    names = [f"image {number}" for number in range(len(mask))]
    return prediction, Batch(torch.zeros(len(mask), 3, *image, dtype=torch.uint8), mask, names)


def semantic(outputs, size, valid):
    classes = outputs.class_logits.softmax(-1)[..., :K]
    return torch.einsum("bqk,bqhw->bkhw", classes, upsample(outputs.mask_logits, size, valid).sigmoid())


def random_mask(shape, seed, classes=(0, 1, 2), ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor(classes)[torch.randint(0, len(classes), shape, generator=generator)].to(torch.uint8)
    mask[torch.rand(shape, generator=generator) < ignored] = 255
    return mask


MASKS = {
    "many": random_mask((2, 10, 13), 0),
    "some classes": torch.cat([random_mask((1, 6, 7), 1, (2,)), random_mask((1, 6, 7), 2, (0, 1), ignored=0.0)]),
    "mostly ignored": random_mask((3, 9, 8), 3, ignored=0.9),
    "one pixel": torch.tensor([[[1]]], dtype=torch.uint8),
    "one image without labels": torch.cat([torch.full((1, 4, 4), 255).byte(), random_mask((1, 4, 4), 4)]),
}


def fix_points(monkeypatch, points):
    """Sample the same points (1, P, 2) of every image and mask."""
    monkeypatch.setattr(mask_classification, "random_points", lambda count, *_: points.expand(count, -1, -1))
    monkeypatch.setattr(
        mask_classification, "uncertain_points", lambda masks, *_, **__: points.expand(len(masks), -1, -1)
    )


@pytest.fixture
def fixed_points(monkeypatch):
    points = torch.rand(1, 17, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    fix_points(monkeypatch, points)
    return points[0].tolist()


def bilinear(grid, x, y, valid):
    """Read a map at a point, cell centres at (i + 0.5) / cells, constant past the outermost."""
    height, width = len(grid), len(grid[0])
    row = min(max(y * valid[0] * height - 0.5, 0), height - 1)
    column = min(max(x * valid[1] * width - 0.5, 0), width - 1)
    top, left = math.floor(row), math.floor(column)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = row - top, column - left
    return (1 - down) * ((1 - across) * grid[top][left] + across * grid[top][right]) + down * (
        (1 - across) * grid[bottom][left] + across * grid[bottom][right]
    )


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def mask_and_dice(logits, truth):
    """Compare logits and labels, None where unlabelled, at points."""
    pairs = [(x, t) for x, t in zip(logits, truth, strict=True) if t is not None]
    entropy = sum(-math.log(sigmoid(x) if t else sigmoid(-x)) for x, t in pairs) / max(1, len(pairs))
    overlap, areas = sum(sigmoid(x) * t for x, t in pairs), sum(sigmoid(x) + t for x, t in pairs)
    return entropy, 1 - (2 * overlap + 1) / (areas + 1)


def by_hand(layer, mask, points, valid, weights, no_object=0.1):
    """Return the class, mask and dice terms of one layer, matched by trying every assignment."""
    sums = [0.0, 0.0]
    count = 0
    class_total = 0.0
    class_norm = 0.0
    for b, labels in enumerate(mask.tolist()):
        found = [labels[int(y * len(labels))][int(x * len(labels[0]))] for x, y in points]
        present = sorted({k for row in labels for k in row} - {255})
        if not present:
            continue
        shares = layer.class_logits[b].detach().double().softmax(-1).tolist()
        maps = layer.mask_logits[b].detach().double().tolist()
        logits = [[bilinear(grid, x, y, valid) for x, y in points] for grid in maps]
        terms = {
            (q, k): mask_and_dice(logits[q], [None if at == 255 else int(at == k) for at in found])
            for q in range(len(maps))
            for k in present
        }

        def cost(queries, present=present, shares=shares, terms=terms):
            pairs = list(zip(queries, present, strict=True))
            return sum(-2 * shares[q][k] + 5 * terms[q, k][0] + 5 * terms[q, k][1] for q, k in pairs)

        best = min(itertools.permutations(range(len(maps)), len(present)), key=cost)
        matched = dict(zip(best, present, strict=True))
        for q, k in matched.items():
            sums = [sums[0] + terms[q, k][0], sums[1] + terms[q, k][1]]
            count += 1
        for q, row in enumerate(shares):
            if q in matched or len(row) == K + 1:
                weight = weights[matched[q]] if q in matched else no_object
                class_total -= weight * math.log(row[matched.get(q, K)])
                class_norm += weight
    return class_total / class_norm, sums[0] / count, sums[1] / count, count


@pytest.mark.parametrize(
    ("name", "columns", "dtype"),
    [
        *((name, columns, torch.float64) for name in MASKS for columns in (K + 1, K)),
        ("many", K + 1, torch.float32),
        ("some classes", K, torch.float32),
    ],
)
def test_agrees_with_loops_and_every_permutation(fixed_points, name, columns, dtype):
    prediction, batch = make(MASKS[name], columns=columns, dtype=dtype)
    value, parts = MaskClassification(WEIGHTS)(prediction, batch)
    outputs = prediction.outputs
    given = (batch.mask, fixed_points, prediction.valid, WEIGHTS.tolist())
    terms = [by_hand(layer, *given) for layer in (outputs, *outputs.aux)]
    expected = sum(2 * of_class + 5 * mask + 5 * dice for of_class, mask, dice, _ in terms)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert value.dtype == dtype and value.item() == pytest.approx(expected, rel=tolerance)
    assert [parts[key].item() for key in ("class", "mask", "dice")] == pytest.approx(terms[0][:3], rel=tolerance)


def test_other_factors_and_no_object_weight(fixed_points):
    prediction, batch = make(MASKS["many"], aux=0)
    criterion = MaskClassification(WEIGHTS, no_object=0.7)
    given = (batch.mask, fixed_points, prediction.valid, WEIGHTS.tolist())
    of_class, *_ = by_hand(prediction.outputs, *given, no_object=0.7)
    assert criterion(prediction, batch)[1]["class"].item() == pytest.approx(of_class, rel=1e-10)
    value, parts = MaskClassification(WEIGHTS, factors={"class": 1.0, "mask": 0.0, "dice": 3.0})(prediction, batch)
    assert value.item() == pytest.approx((parts["class"] + 3 * parts["dice"]).item(), rel=1e-12)


def between_centres():
    ys, xs = torch.meshgrid(torch.arange(1, 11), torch.arange(1, 15), indexing="ij")
    return torch.stack([(xs + 0.5) / 16, (ys + 0.5) / 12], dim=-1).reshape(1, -1, 2)


@pytest.mark.parametrize(
    ("ignored", "points", "options"),
    [
        (0.0, between_centres(), {}),  # all labelled, and points between cell centres: no difference by default
        (0.3, torch.rand(1, 60, 2, generator=torch.Generator().manual_seed(1)), ORIGINAL),
        (0.8, torch.rand(1, 60, 2, generator=torch.Generator().manual_seed(2)), ORIGINAL),
    ],
)
def test_agrees_with_transformers(monkeypatch, ignored, points, options):
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    mask = random_mask((2, 12, 16), 0, ignored=ignored)
    prediction, batch = make(mask, image=(24, 32), grid=(6, 8), dtype=torch.float32)
    fix_points(monkeypatch, points)
    value, parts = MaskClassification(torch.ones(K), **options)(prediction, batch)

    config = Mask2FormerConfig(num_labels=K, train_num_points=points.shape[1])
    theirs = Mask2FormerLoss(config, {})
    theirs.sample_points_using_uncertainty = lambda masks, *_: points.expand(len(masks), -1, -1)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: points)
    classes = [labels[labels != 255].unique().long() for labels in mask]
    outputs = prediction.outputs
    found = theirs(
        outputs.mask_logits,
        outputs.class_logits,
        [(labels == own[:, None, None]).float() for labels, own in zip(mask, classes, strict=True)],
        classes,
        [{"masks_queries_logits": a.mask_logits, "class_queries_logits": a.class_logits} for a in outputs.aux],
    )
    names = {"class": "loss_cross_entropy", "mask": "loss_mask", "dice": "loss_dice"}
    expected = sum(FACTORS[ours] * found[f"{name}{end}"] for ours, name in names.items() for end in ("", "_0", "_1"))
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    for ours, name in names.items():
        torch.testing.assert_close(parts[ours], found[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("images", "columns"), [(2, K), (0, K + 1)])
def test_a_batch_without_labels_gives_zero_and_finite_gradients(images, columns):
    prediction, batch = make(torch.full((images, 6, 5), 255, dtype=torch.uint8), columns=columns, dtype=torch.bfloat16)
    value, parts = MaskClassification(WEIGHTS)(prediction, batch)
    value.backward()
    assert value.dtype == torch.float32 and value.item() == 0 and set(parts) == {"class", "mask", "dice"}
    assert all(bool((tensor.grad == 0).all()) for tensor in collect_tensors(prediction.outputs))


def test_parts_of_a_batch_add_up_to_its_loss(fixed_points):
    mask = torch.cat([MASKS["some classes"], random_mask((1, 6, 7), 9)])
    prediction, batch = make(mask, aux=0, columns=K)
    criterion = MaskClassification(WEIGHTS)
    whole, _ = criterion(prediction, batch)
    divisors = criterion.divisors(batch)
    total = 0.0
    for at in (slice(0, 1), slice(1, 3)):
        own = prediction.of_images(at), Batch(batch.image[at], batch.mask[at], batch.names[at])
        part, value, _ = criterion.step_loss(*own, divisors)
        assert value == criterion(*own)[0] and not value.requires_grad
        total = total + part
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)


def test_images_without_labels_count_with_ignored_background(fixed_points):
    mask = random_mask((2, 10, 13), 0)
    mask[1] = 255
    prediction, batch = make(mask)
    excluded, background = (MaskClassification(WEIGHTS, ignored=ignored) for ignored in ("excluded", "background"))
    assert [loss.divisors(batch)[-1] for loss in (excluded, background)] == [1, 2]
    outputs = prediction.outputs
    classes, masks = torch.autograd.grad(background(prediction, batch)[0], [outputs.class_logits, outputs.mask_logits])
    assert classes[1].any()  # queries of an image without labels predict no object
    assert not masks[1].any()


def test_more_classes_than_queries_are_refused():
    prediction, batch = make(MASKS["many"], queries=3)
    assert MaskClassification(WEIGHTS)(prediction, batch)[0].isfinite()
    prediction, batch = make(MASKS["many"], queries=2)
    words = ("num_queries=2: image 0 has 3 classes", "Give the head num_queries=3")
    assert_refused(lambda: MaskClassification(WEIGHTS)(prediction, batch), *words)


def test_another_ignore_value(fixed_points):
    prediction, batch = make(MASKS["many"])
    expected = MaskClassification(WEIGHTS)(prediction, batch)[0]
    batch.mask = batch.mask.where(batch.mask != 255, 77)
    torch.testing.assert_close(MaskClassification(WEIGHTS, ignore_index=77)(prediction, batch)[0], expected)


def test_a_prediction_that_is_not_finite_shows_in_the_loss():
    prediction, batch = make(MASKS["many"])
    prediction.outputs.class_logits.data[0, 1] = math.nan
    prediction.outputs.mask_logits.data[1] = math.inf
    assert not MaskClassification(WEIGHTS)(prediction, batch)[0].isfinite()


def test_the_seed_decides_the_points():
    prediction, batch = make(MASKS["many"])
    criterion = MaskClassification(WEIGHTS, num_points=30)
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(criterion(prediction, batch)[0].item())
    assert values[0] == values[1] != values[2]
