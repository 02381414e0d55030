"""Objects of the masks of queries, compared with plain loops in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretended_cuda import Pretended, pretended_cuda

from dinoseg.core.geometry import upsample
from dinoseg.extensions.objects import finding
from dinoseg.extensions.objects.finding import find_instances, find_segments
from dinoseg.extensions.objects.tasks import PanopticTask
from dinoseg.utils.errors import UserError


def draw(seed):
    """Return class logits (2, Q, K + 1), mask logits (2, Q, h, w), size, K and things, of several kinds."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    num_classes, queries = int(rng.integers(1, 5)), int(rng.integers(1, 60))
    size, grid = (tuple(int(side) for side in rng.integers(low, high, 2)) for low, high in ((1, 40), (1, 9)))
    classes = torch.randn(2, queries, num_classes + 1, dtype=torch.float64) * (1 + 5 * (seed % 3))
    masks = torch.randn(2, queries, *grid, dtype=torch.float64) * 4
    if seed % 4 == 1:  # few queries that are sure, each of a part of the image
        classes[:, 6:, -1] += 40
        masks -= 4 * torch.arange(queries, dtype=torch.float64)[:, None, None] % 3
    if seed % 4 == 2:  # empty masks and equal probabilities
        masks[:, ::2] = -1 - masks[:, ::2].abs()
        classes[:, 1::2] = classes[:, :1]
    if seed % 4 == 3:
        classes[..., -1] += 100  # nothing
    things = frozenset(np.flatnonzero(rng.random(num_classes) < 0.6).tolist()) or frozenset({0})
    return classes, masks, size, num_classes, things


def full_size(masks, size):
    return F.interpolate(masks, size, mode="bilinear")


def instances_by_loops(classes, masks, num_classes, things):
    shares = classes.softmax(-1)[:, :num_classes]
    pairs = [(-float(shares[q, k]), q, k) for q in range(len(shares)) for k in range(num_classes)]
    found = []
    for share, query, label in sorted(pairs)[:100]:
        inside = masks[query] > 0
        if label in things and inside.any():
            mean = masks[query].sigmoid()[inside].sum() / (inside.sum() + 1e-6)
            found.append((float(-share * mean), label, inside.numpy()))
    return sorted(found, key=lambda each: -each[0])


def segments_by_loops(classes, masks, num_classes, things):
    """Return {(class, number): mask}, the number of the query of a thing, and -1 of stuff."""
    scores, labels = classes.softmax(-1).max(-1)
    kept = [q for q in range(len(scores)) if labels[q] < num_classes and scores[q] > 0.8]
    shares = masks.sigmoid().numpy()
    found = {}
    if not kept:
        return found
    winner = np.array(kept)[np.stack([float(scores[q]) * shares[q] for q in kept]).argmax(axis=0)]
    for query in kept:
        own, inside = winner == query, shares[query] >= 0.5
        if inside.any() and (own & inside).any() and own.sum() / inside.sum() >= 0.8:
            label = int(labels[query])
            key = (label, query if label in things else -1)
            found[key] = found.get(key, False) | (own & inside)
    return found


def test_instances_equal_plain_loops():
    total = 0
    for seed in range(60):
        classes, masks, size, num_classes, things = draw(seed)
        found = find_instances(classes, masks, size, (1.0, 1.0), num_classes, things)
        for image, objects in enumerate(found):
            expected = instances_by_loops(classes[image], full_size(masks, size)[image], num_classes, things)
            assert objects.scores == pytest.approx([score for score, _, _ in expected], abs=1e-9)
            assert objects.classes.tolist() == [label for _, label, _ in expected]
            for mask, (_, _, own) in zip(objects.masks, expected, strict=True):
                assert np.array_equal(mask.to_mask(size), own)
            total += len(objects)
    assert total > 1000


def test_segments_equal_plain_loops():
    total = 0
    for seed in range(120):
        classes, masks, size, num_classes, things = draw(seed)
        found = find_segments(classes, masks, size, (1.0, 1.0), num_classes, things)
        for image, objects in enumerate(found):
            expected = segments_by_loops(classes[image], full_size(masks, size)[image], num_classes, things)
            got = sorted(
                (int(k), m.to_mask(size).tobytes()) for k, m in zip(objects.classes, objects.masks, strict=True)
            )
            assert got == sorted((label, own.tobytes()) for (label, _), own in expected.items())
            assert (np.diff(objects.scores) <= 0).all()
            total += len(objects)
    assert total > 50


@pytest.mark.parametrize("find", [find_instances, find_segments])
@pytest.mark.parametrize("values", [1, 3000])  # at full size, that an accelerator holds at once
def test_number_of_masks_upsampled_at_once_changes_nothing(monkeypatch, find, values):
    monkeypatch.setattr(finding, "_CHUNK", values)
    total = 0
    for seed in (0, 1, 2, 4, 5, 6):
        classes, masks, size, *things = draw(seed)
        expected = find(classes, masks, size, (1.0, 1.0), *things)
        with pretended_cuda():
            found = find(Pretended(classes), Pretended(masks), size, (1.0, 1.0), *things)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.scores == pytest.approx(theirs.scores, abs=1e-9)
            assert ours.classes.tolist() == theirs.classes.tolist()
            for mask, other in zip(ours.masks, theirs.masks, strict=True):
                assert np.array_equal(mask.to_mask(size), other.to_mask(size))
            total += len(ours)
    assert total > 5


def test_scores_do_not_depend_on_how_many_objects_are_found():
    for seed in range(40):
        torch.manual_seed(seed)
        height, width = torch.randint(20, 90, (2,)).tolist()
        logits = torch.randn(1, 9, 3) * 3, torch.randn(1, 9, 10, 14)
        found = [
            find_instances(*logits, (height, width), (1.0, 0.9), 2, range(2), max_instances=most)[0]
            for most in (2, 3, 100)
        ]
        for fewer in found[:2]:
            assert {*fewer.scores} <= {*found[2].scores}


def test_masks_are_upsampled_before_they_are_decided():
    classes = torch.tensor([[[9.0, 0.0]]])
    masks = torch.tensor([[[[3.0, -1.0], [-1.0, -1.0]]]])
    (objects,) = find_instances(classes, masks, (6, 9), (1.0, 0.75), 1, {0})
    expected = upsample(masks, (6, 9), (1.0, 0.75))[0, 0] > 0
    assert np.array_equal(objects.masks[0].to_mask((6, 9)), expected.numpy())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    torch.manual_seed(0)
    classes = torch.randn(1, 5, 4).to(dtype)
    masks = torch.randn(1, 5, 4, 4).to(dtype)
    half = find_instances(classes, masks, (9, 7), (1.0, 1.0), 3, {0, 1, 2})[0]
    full = find_instances(classes.float(), masks.float(), (9, 7), (1.0, 1.0), 3, {0, 1, 2})[0]
    assert np.array_equal(half.scores, full.scores)


def test_head_without_a_no_object_column():
    (objects,) = find_instances(torch.zeros(1, 1, 2), torch.ones(1, 1, 2, 2), (2, 2), (1.0, 1.0), 2, {0, 1})
    share = float(torch.ones(1).sigmoid())
    assert objects.classes.tolist() == [0, 1] and objects.scores == pytest.approx([0.5 * share] * 2, rel=1e-5)


def test_thresholds_of_the_task_choose_segments():
    classes = torch.tensor([[[0.7, 0.1, 0.1, 0.1]]]).log()
    masks = torch.ones(1, 1, 3, 3)
    found = [
        PanopticTask(["a", "b", "c"], score_threshold=threshold).find_objects(classes, masks, (3, 3), (1.0, 1.0))[0]
        for threshold in (0.8, 0.6)
    ]
    assert [len(objects) for objects in found] == [0, 1]
    with pytest.raises(UserError):
        PanopticTask(["a"], overlap_threshold=1.5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("find", [find_instances, find_segments])
@pytest.mark.parametrize("side", [0, 1])
def test_logits_that_are_not_finite_are_refused(find, side, value):
    logits = torch.zeros(1, 4, 3), torch.ones(1, 4, 6, 6)
    logits[side].view(-1)[5] = value
    with pytest.raises(UserError, match="not finite"):
        find(*logits, (6, 6), (1.0, 1.0), 2, [0, 1])
