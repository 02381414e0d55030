"""Mask classification of objects against loops over their binary masks, and the loss of transformers, in float64."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from dinoseg.core.object_ids import OBJECTS, encode_object, stack_objects
from dinoseg.core.shapes import Batch, MaskOutputs, Prediction, collect_tensors, pad_layers
from dinoseg.core.targets import NO_TARGET, UNLABELLED
from dinoseg.extensions.objects.tasks import InstanceTask, PanopticTask
from dinoseg.losses import mask_classification
from dinoseg.losses.mask_classification import FACTORS, MaskClassification

CLASSES = ["ground", "leaf", "fruit", "sky"]
K = len(CLASSES)
WEIGHTS = torch.tensor([0.25, 1.0, 3.0, 0.6], dtype=torch.float64)
SIZE = (9, 11)
TASKS = {kind: kind(CLASSES, ["leaf", "fruit"], "ground") for kind in (InstanceTask, PanopticTask)}
ORIGINAL = {"ignored": "background", "interpolation": "bilinear"}


def draw_image(rng):
    """Return a mask, objects (N, H, W), and the drawn ones: class, whether it is a crowd, and its pixels (H, W)."""
    mask = rng.choice([0, 3], SIZE).astype(np.uint8)
    drawn = []
    for _ in range(rng.integers(0, 8)):
        pixels = np.zeros(SIZE, bool)
        top, left = rng.integers(-3, SIZE)
        pixels[max(top, 0) : max(top + rng.integers(1, 7), 0), max(left, 0) : max(left + rng.integers(1, 7), 0)] = True
        drawn.append((int(rng.integers(1, 3)), bool(rng.random() < 0.2), pixels))
        mask[pixels] = drawn[-1][0]
    values = [encode_object(number, each[0], crowd=each[1]) for number, each in enumerate(drawn, 1)]
    flat = [np.flatnonzero(each[2]) for each in drawn]
    objects = stack_objects(zip(values, flat, strict=True), SIZE)
    if rng.random() < 0.5:
        mask[rng.random(SIZE) < rng.choice([0.1, 0.5, 1])] = 255
    return mask, objects, drawn


def find_masks(kind, mask, drawn):
    """Return the binary masks and classes of the targets of an image, and its ignored pixels."""
    covered, crowded = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    targets = []
    for class_id, crowd, pixels in drawn:
        if crowd:
            crowded |= pixels
        elif pixels.any():
            covered |= pixels
            targets.append((class_id, pixels))
    for class_id in (0, 3) if kind is PanopticTask else ():
        pixels = (mask == class_id) & ~covered & ~crowded
        if pixels.any():
            targets.append((class_id, pixels))
    return targets, ~covered & ((mask == 255) | crowded)


def draw_case(seed, kind, dtype=torch.float64):
    """Return a prediction, its batch, and the masks of each image."""
    rng = np.random.default_rng(seed)
    images = [draw_image(rng) for _ in range(rng.integers(1, 4))]
    queries = int(rng.integers(3, 10))
    shapes = ((K + 1,), (3, 4))
    layers = []
    for _ in range(2):
        scores = [torch.from_numpy(2 * rng.normal(size=(len(images), queries, *shape))).to(dtype) for shape in shapes]
        layers.append(MaskOutputs(*(each.requires_grad_() for each in scores)))
    outputs = MaskOutputs(layers[0].class_logits, layers[0].mask_logits, layers[1:])
    prediction = Prediction(outputs, SIZE, (0.9, 0.8), None, mixture=True, task=TASKS[kind])
    mask = torch.from_numpy(np.stack([image[0] for image in images]))
    objects = torch.stack(pad_layers([torch.from_numpy(image[1]) for image in images], ndim=3))
    batch = Batch(mask, mask, [f"image {number}" for number in range(len(images))], {OBJECTS: objects})
    return prediction, batch, [find_masks(kind, mask, drawn) for mask, _, drawn in images]


def make_loss(kind, **options):
    loss = MaskClassification(WEIGHTS, **options)
    loss.task = TASKS[kind]
    return loss


@pytest.fixture
def points(monkeypatch):
    points = torch.rand(1, 23, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(mask_classification, "random_points", lambda count, *_: points.expand(count, -1, -1))
    chosen = lambda masks, *_, **__: points.expand(len(masks), -1, -1)  # noqa: E731
    monkeypatch.setattr(mask_classification, "uncertain_points", chosen)
    return points[0]


def compare(logits, truth):
    """Return the binary cross-entropy and dice loss of the logits (P,) of points that count."""
    entropy = F.softplus(logits) - logits * truth
    overlap = (logits.sigmoid() * truth).sum()
    areas = logits.sigmoid().sum() + truth.sum()
    return entropy.sum() / max(1, len(truth)), 1 - (2 * overlap + 1) / (areas + 1)


def by_hand(layer, images, points, valid, *, excluded):
    """Return the class, mask and dice terms of a layer, from loops over images and masks."""
    entropies = []
    dices = []
    class_total = 0
    class_norm = 0
    count = 0
    rows = (points[:, 1] * SIZE[0]).long()
    columns = (points[:, 0] * SIZE[1]).long()
    grid = 2 * points * torch.tensor([valid[1], valid[0]], dtype=torch.float64) - 1
    for classes, maps, (targets, ignored) in zip(layer.class_logits, layer.mask_logits, images, strict=True):
        logits = F.grid_sample(maps[None], grid[None, None], padding_mode="border", align_corners=False)[0, :, 0]
        counts = torch.from_numpy(~ignored | (not excluded))[rows, columns]
        terms = {}
        for number, (_, pixels) in enumerate(targets):
            truth = torch.from_numpy(pixels)[rows, columns].double()
            for query, of_query in enumerate(logits):
                terms[query, number] = compare(of_query[counts], truth[counts])
        cost = np.zeros((len(logits), len(targets)))
        for (query, number), (entropy, dice) in terms.items():
            share = classes[query].softmax(-1)[targets[number][0]]
            cost[query, number] = (5 * entropy + 5 * dice - 2 * share).item()
        matched = dict(zip(*linear_sum_assignment(cost), strict=True))
        count += len(targets)
        for query, number in matched.items():
            entropies.append(terms[query, number][0])
            dices.append(terms[query, number][1])
        if excluded and ignored.all():
            continue
        for query, row in enumerate(classes.log_softmax(-1)):
            wanted = targets[matched[query]][0] if query in matched else K
            weight = 0.1 if wanted == K else WEIGHTS[wanted]
            class_total, class_norm = class_total - weight * row[wanted], class_norm + weight
    zero = layer.mask_logits.sum() * 0
    of_class = class_total / class_norm if class_norm else zero
    return of_class, sum(entropies, zero) / max(1, count), sum(dices, zero) / max(1, count)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("ignored", ["excluded", "background"])
def test_loss_and_gradients_equal_loops_over_masks(points, kind, ignored):
    seen = set()
    for seed in range(100):
        prediction, batch, images = draw_case(seed, kind)
        value, parts = make_loss(kind, ignored=ignored)(prediction, batch)
        outputs = prediction.outputs
        options = {"excluded": ignored == "excluded"}
        terms = [by_hand(layer, images, points, prediction.valid, **options) for layer in (outputs, *outputs.aux)]
        expected = sum(2 * of_class + 5 * mask + 5 * dice for of_class, mask, dice in terms)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
        for name, term in zip(("class", "mask", "dice"), terms[0], strict=True):
            torch.testing.assert_close(parts[name], term, rtol=1e-10, atol=1e-12)
        tensors = collect_tensors(outputs)
        found, wanted = (torch.autograd.grad(each, tensors, materialize_grads=True) for each in (value, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
        counts = [len(targets) for targets, _ in images]
        seen |= {"none"} if min(counts) == 0 else set()
        seen |= {"too many"} if max(counts) > outputs.class_logits.shape[1] else set()
        seen |= {"layers"} if batch.maps[OBJECTS].shape[1] > 1 else set()
    assert seen >= {"too many", "layers"} and ("none" in seen or kind is PanopticTask)


@pytest.mark.parametrize("kind", TASKS)
def test_original_options_agree_with_transformers(points, kind, monkeypatch):
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    theirs = Mask2FormerLoss(Mask2FormerConfig(num_labels=K, train_num_points=len(points)), {}).double()
    theirs.empty_weight[-1] = 0.1  # of float32 before
    theirs.sample_points_using_uncertainty = lambda masks, *_: points.expand(len(masks), -1, -1)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: points[None])
    ours = MaskClassification(torch.ones(K, dtype=torch.float64), **ORIGINAL)
    ours.task = TASKS[kind]
    for seed in range(100, 200):
        prediction, batch, images = draw_case(seed, kind)
        prediction.valid = (1.0, 1.0)
        outputs = prediction.outputs
        binary, classes = [], []
        for targets, _ in images:
            binary.append(torch.from_numpy(np.array([pixels for _, pixels in targets]).reshape(-1, *SIZE)).double())
            classes.append(torch.tensor([class_id for class_id, _ in targets], dtype=torch.int64))
        value, _ = ours(prediction, batch)
        aux = [{"masks_queries_logits": a.mask_logits, "class_queries_logits": a.class_logits} for a in outputs.aux]
        found = theirs(outputs.mask_logits, outputs.class_logits, binary, classes, aux)
        names = {"class": "loss_cross_entropy", "mask": "loss_mask", "dice": "loss_dice"}
        expected = sum(FACTORS[name] * found[f"{other}{end}"] for name, other in names.items() for end in ("", "_0"))
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
        tensors = collect_tensors(outputs)
        own, other = (torch.autograd.grad(each, tensors, materialize_grads=True) for each in (value, expected))
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", TASKS)
def test_parts_of_a_batch_of_objects_add_up(points, kind):
    for seed in range(20):
        prediction, batch, images = draw_case(seed, kind)
        if max(len(targets) for targets, _ in images) > prediction.outputs.class_logits.shape[1]:
            continue
        criterion = make_loss(kind)
        whole, _ = criterion(prediction, batch)
        divisors = criterion.divisors(batch)
        total = 0.0
        for row, part in enumerate(batch.split(batch.count)):
            own, value, _ = criterion.step_loss(prediction.of_images(slice(row, row + 1)), part, divisors)
            assert value == criterion(prediction.of_images(slice(row, row + 1)), part)[0]
            total = total + own
        torch.testing.assert_close(total, whole, rtol=1e-9, atol=1e-12)


def encode(rows):
    """Return objects (1, 1, H, W) of rows of (number, class) or 0."""
    values = [[each if isinstance(each, int) else encode_object(*each) for each in row] for row in rows]
    return torch.tensor([[values]], dtype=torch.int32)


def test_crowds_and_ignored_pixels_have_no_label():
    crowd = encode_object(3, 1, crowd=True)
    objects = encode([[(1, 2), 0, crowd, 0], [(1, 2), (2, 1), crowd, 0]])
    mask = torch.tensor([[[2, 0, 1, 3], [2, 1, 1, 255]]], dtype=torch.uint8)
    found = TASKS[InstanceTask].targets(mask, {OBJECTS: objects}, K, 255)
    u, n = UNLABELLED, NO_TARGET
    assert found.ids.tolist() == [[[[1, n, u, n], [1, 2, u, u]]]]
    assert (found.present.tolist(), found.classes.tolist(), found.labelled.tolist()) == ([[1, 2]], [[2, 1]], [True])
    found = TASKS[PanopticTask].targets(mask, {OBJECTS: objects}, K, 255)
    assert found.ids.tolist() == [[[[1, 3, u, 6], [1, 2, u, u]]]]
    assert (found.present.tolist(), found.classes.tolist()) == ([[1, 2, 3, 6]], [[2, 1, 0, 3]])
    found = TASKS[PanopticTask].targets(mask, {OBJECTS: objects}, K, 0)  # class 0 is ignored
    assert found.ids.tolist() == [[[[1, u, u, 6], [1, 2, u, n]]]] and found.classes.tolist() == [[2, 1, 3]]
    below = torch.zeros_like(mask).masked_fill(objects[:, 0, 0] == crowd, 3)
    assert TASKS[PanopticTask].targets(below, {OBJECTS: objects}, K, 255).classes.tolist() == [[2, 1, 0]]


@pytest.mark.parametrize(("value", "labelled"), [(0, True), (255, False)])
def test_images_without_objects_are_negatives_if_labelled(value, labelled):
    mask = torch.full((2, 4, 5), value, dtype=torch.uint8)
    outputs = MaskOutputs(torch.randn(2, 3, K + 1, requires_grad=True), torch.randn(2, 3, 2, 2, requires_grad=True))
    prediction = Prediction(outputs, (4, 5), (1.0, 1.0), None, mixture=True)
    batch = Batch(mask, mask, ["a", "b"], {OBJECTS: torch.zeros(2, 0, 4, 5, dtype=torch.int32)})
    criterion = MaskClassification(torch.ones(K))
    criterion.task = TASKS[InstanceTask]
    value, parts = criterion(prediction, batch)
    expected = -outputs.class_logits.log_softmax(-1)[..., K].mean() if labelled else torch.zeros(())
    torch.testing.assert_close(parts["class"], expected)
    value.backward()
    assert parts["mask"] == parts["dice"] == 0 and outputs.class_logits.grad.any() == labelled
    assert criterion.divisors(batch).tolist() == [0, 0, 2 * labelled]


def test_more_objects_than_queries_are_warned_of_once(caplog):
    objects = torch.arange(12, dtype=torch.int32).view(1, 1, 3, 4) + encode_object(1, 1)
    mask = torch.ones(1, 3, 4, dtype=torch.uint8)
    outputs = MaskOutputs(torch.randn(1, 5, K + 1), torch.randn(1, 5, 3, 4))
    prediction = Prediction(outputs, (3, 4), (1.0, 1.0), None, mixture=True)
    criterion = make_loss(InstanceTask, num_points=20)
    with caplog.at_level(logging.WARNING):
        for name in ("first", "second"):
            assert criterion(prediction, Batch(mask, mask, [name], {OBJECTS: objects}))[0].isfinite()
    assert [record.getMessage() for record in caplog.records] == [
        "first has 12 target masks for 5 queries: only those that fit best train the model, here and in any other such "
        "image. Give the head num_queries=12 or more."
    ]


def test_more_objects_than_queries_never_raise_the_class_loss():
    """Classes lighter than "no object": a crowded image has no query without an object, not fewer than none."""
    objects = torch.zeros(2, 1, 3, 4, dtype=torch.int32)
    objects[0] = torch.arange(12, dtype=torch.int32).view(3, 4) + encode_object(1, 1)
    mask = (objects[:, 0] > 0).to(torch.uint8)
    outputs = MaskOutputs(torch.zeros(2, 5, K + 1), torch.zeros(2, 5, 3, 4))
    prediction = Prediction(outputs, (3, 4), (1.0, 1.0), None, mixture=True)
    whole = Batch(mask, mask, ["crowded", "empty"], {OBJECTS: objects})
    criterion = MaskClassification(torch.full((K,), 0.2), factors={"class": 1, "mask": 0, "dice": 0}, no_object=0.4)
    criterion.task = TASKS[InstanceTask]
    for row, batch in enumerate(whole.split(2)):
        own = prediction.of_images(slice(row, row + 1))
        for counted in (whole, batch):
            value, alone, _ = criterion.step_loss(own, batch, criterion.divisors(counted))
            assert value > 0
        torch.testing.assert_close(value, alone)
