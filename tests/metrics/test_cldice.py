"""Thinning and clDice equal plain loops on random ugly images."""

import numpy as np
import pytest
from scipy import ndimage
from test_metric_contract import CLASSES, score, ugly_case

from dinoseg.core.metric import LabelledImage, PredictedImage
from dinoseg.metrics import ClDice
from dinoseg.metrics.thinning import thin_masks
from dinoseg.utils.errors import UserError


def thin_mask(mask):
    """Return the skeleton of one mask, pixel by pixel, by the conditions of Guo and Hall (1989) as they state them."""
    inside = np.pad(mask, 1).astype(int)
    step, idle = 0, 0
    while idle < 2:
        removed = []
        for row, column in np.argwhere(inside):
            above, here, below = (inside[row + shift, column - 1 : column + 2] for shift in (-1, 0, 1))
            p9, p2, p3, p8, p4, p7, p6, p5 = *above, here[0], here[2], *below
            parts = (not p2 and p3 | p4) + (not p4 and p5 | p6) + (not p6 and p7 | p8) + (not p8 and p9 | p2)
            first = (p9 | p2) + (p3 | p4) + (p5 | p6) + (p7 | p8)
            second = (p2 | p3) + (p4 | p5) + (p6 | p7) + (p8 | p9)
            blocked = (p6 or p7 or not p9) and p8 if step % 2 else (p2 or p3 or not p5) and p4
            if parts == 1 and 2 <= min(first, second) <= 3 and not blocked:
                removed.append((row, column))
        for place in removed:
            inside[place] = 0
        idle = 0 if removed else idle + 1
        step += 1
    return inside[1:-1, 1:-1].astype(bool)


def reference_scores(images, classes=range(1, CLASSES)):
    """Return clDice and skeleton recall, means over the classes, by sets of pixels."""
    found, recalls = [], []
    for label in classes:
        hits = predicted = covered = held = 0
        for ids, mask in images:
            ours, theirs = ((side == label) & (mask != 255) for side in (ids, mask))
            hits += (thin_mask(ours) & theirs).sum()
            predicted += thin_mask(ours).sum()
            covered += (thin_mask(theirs) & ours).sum()
            held += thin_mask(theirs).sum()
        if held:
            recalls.append(covered / held)
        if held and predicted and covered and hits:
            found.append(2 / (predicted / hits + held / covered))
        elif held or predicted:
            found.append(0.0)
    return [sum(values) / len(values) if values else None for values in (found, recalls)]


def test_thinning_equals_plain_loops_on_ugly_maps():
    for seed in range(120):
        for ids, _ in ugly_case(seed):
            skeletons = thin_masks(ids, CLASSES)
            for label in range(CLASSES):
                assert np.array_equal(skeletons == label, thin_mask(ids == label)), (seed, label)


def test_thinning_keeps_each_part_and_thin_lines():
    for seed in range(40):
        mask = np.random.default_rng(seed).random((19, 26)) < 0.6
        skeleton = thin_masks(mask.astype(np.uint8), 0) == 1
        parts, number = ndimage.label(mask, np.ones((3, 3)))
        assert ndimage.label(skeleton, np.ones((3, 3)))[1] == number
        assert not (skeleton & ~mask).any() and set(parts[skeleton]) == set(parts[mask])
    for thin in (np.eye(9, dtype=np.uint8), np.ones((1, 9), np.uint8), np.ones((1, 1), np.uint8)):
        assert np.array_equal(thin_masks(thin, 0), thin)


def test_thick_bar_becomes_its_centre_line():
    ids = np.zeros((40, 60), np.uint8)
    ids[18:23, 5:55] = 1
    skeleton = thin_masks(ids, 0)
    assert skeleton[20, 10:50].all() and skeleton.sum() <= 50


def test_cldice_equals_plain_loops_on_ugly_cases():
    for seed in range(80):
        images = ugly_case(seed)
        found = score(ClDice(), images)
        assert [found["cldice"], found["skeleton_recall"]] == pytest.approx(reference_scores(images), abs=1e-12), seed
        chosen = score(ClDice(classes=[2, 0]), images)
        assert [*chosen.values()] == pytest.approx(reference_scores(images, (0, 2)), abs=1e-12), seed


def test_broken_thread_lowers_recall_more_than_a_thin_one():
    thread = np.zeros((32, 64), np.uint8)
    thread[14:19] = 1
    narrow, cut = thread.copy(), thread.copy()
    narrow[[14, 18]] = 0
    cut[:, 20:44] = 0
    assert score(ClDice(), [(narrow, thread)])["skeleton_recall"] == 1
    assert score(ClDice(), [(cut, thread)])["skeleton_recall"] < 0.65


def test_ignored_class_and_pixels_are_not_scored():
    ids, mask = np.zeros((2, 8, 8), np.uint8)
    ids[4], mask[4] = 1, 1
    assert score(ClDice(), [(ids, mask)], ignored=1) == {"cldice": None, "skeleton_recall": None}
    mask[:] = 255
    assert score(ClDice(), [(ids, mask)]) == {"cldice": None, "skeleton_recall": None}


def test_classes_outside_the_data_are_refused():
    ids = np.zeros((8, 8), np.uint8)
    with pytest.raises(UserError, match=r"classes=\[1, 4\].*from 0 to 3"):
        ClDice(classes=[1, 4]).count(PredictedImage(ids), LabelledImage(ids, CLASSES))
    with pytest.raises(UserError, match=r"classes=\[1, 4\].*from 0 to 3"):
        ClDice(classes=[1, 4]).check_classes(CLASSES)
    ClDice(classes=[1, 3]).check_classes(CLASSES)


def test_layers_cannot_be_chosen():
    ClDice().check_classes(1, has_layers=True)
    with pytest.raises(UserError, match=r"classes=\[0\]: each class has its own mask"):
        ClDice(classes=[0]).check_classes(CLASSES, has_layers=True)


def test_predictions_of_the_ignored_class_count_nowhere():
    mask, ids = np.zeros((2, 8, 12), np.uint8)
    mask[2], ids[2], ids[5] = 2, 2, 1
    pair = PredictedImage(ids), LabelledImage(mask, num_classes=3, ignore_index=1)
    assert ClDice().score([ClDice().count(*pair)]) == {"cldice": 1.0, "skeleton_recall": 1.0}


def test_empty_classes_are_refused():
    with pytest.raises(UserError, match=r"classes=\[\]"):
        ClDice(classes=[])
