"""Thinning and clDice equal plain loops on random ugly images."""

import numpy as np
import pytest
from test_metric_contract import CLASSES, score, ugly_case

from dinoseg.metrics import ClDice
from dinoseg.metrics.thinning import thin_masks


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
    for seed in range(30):
        for ids, _ in ugly_case(seed):
            skeletons = thin_masks(ids, CLASSES)
            for label in range(CLASSES):
                assert np.array_equal(skeletons == label, thin_mask(ids == label)), (seed, label)


def test_cldice_equals_plain_loops_on_ugly_cases():
    for seed in range(25):
        images = ugly_case(seed)
        found = score(ClDice(), images)
        assert [found["cldice"], found["skeleton_recall"]] == pytest.approx(reference_scores(images), abs=1e-12), seed
        chosen = score(ClDice(classes=[2, 0]), images)
        assert [*chosen.values()] == pytest.approx(reference_scores(images, (0, 2)), abs=1e-12), seed


def test_check_accepts_classes_of_the_data_and_layers():
    ClDice(classes=[1, 3]).check_classes(CLASSES)
    ClDice().check_classes(1, has_layers=True)


def test_predictions_of_the_ignored_class_count_nowhere():
    mask, ids = np.zeros((2, 8, 12), np.uint8)
    ids[5] = mask[7] = 1
    assert score(ClDice(), [(ids, mask)], ignored=1) == {"cldice": None, "skeleton_recall": None}
    mask[2], ids[2] = 2, 2
    assert score(ClDice(), [(ids, mask)], ignored=1) == {"cldice": 1.0, "skeleton_recall": 1.0}
