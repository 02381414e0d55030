"""Instances of several models as one, compared with masks of pixels."""

import numpy as np
import pytest

from dinoseg.core.objects import Objects
from dinoseg.extensions.objects.fusing import fuse_instances


def fuse_pixels(members, most):
    """Return masks, classes and scores of the fused objects, from arrays of each model."""
    entries = [(*entry, owner) for owner, each in enumerate(members) for entry in zip(*each, strict=True)]
    groups = []
    for mask, label, score, owner in sorted(entries, key=lambda entry: -entry[2]):
        best, share = None, 0.5
        for group in groups:
            first = group[0][0]
            iou = (first & mask).sum() / max((first | mask).sum(), 1)
            other = any(entry[3] == owner for entry in group)
            if group[0][1] == label and not other and (iou > share or (best is None and iou >= share)):
                best, share = group, iou
        if best is None:
            groups.append(best := [])
        best.append((mask, label, score, owner))
    fused = []
    for group in groups:
        weight = sum(score for _, _, score, _ in group)
        votes = sum(score * mask for mask, _, score, _ in group)
        fused.append((2 * votes > weight, group[0][1], weight / len(members)))
    kept = [entry for entry in fused if entry[0].any()]
    return sorted(kept, key=lambda entry: -entry[2])[:most]


def draw(rng, size):
    """Return masks, classes and scores of objects that are alike in all models."""
    count = rng.integers(5)
    masks = np.zeros((count, *size), bool)
    for mask in masks:
        top, left = (int(rng.integers(2)) + 4 * int(rng.integers(side // 4)) for side in size)
        mask[top : top + 4, left : left + int(rng.integers(0, 5))] = True
    return masks, rng.integers(2, size=count), rng.choice([0.2, 0.5, 0.7, 0.9, 1], count)


@pytest.mark.parametrize("seed", range(4))
def test_fused_instances_are_those_of_a_vote_of_pixels(seed):
    rng = np.random.default_rng(seed)
    joined = 0
    for _ in range(100):
        size = tuple(int(each) for each in rng.integers(4, 13, 2))
        members = [draw(rng, size) for _ in range(rng.integers(2, 5))]
        found = fuse_instances([Objects.of_masks(*each) for each in members], 6)
        expected = fuse_pixels(members, 6)
        assert found.classes.tolist() == [label for _, label, _ in expected]
        np.testing.assert_allclose(found.scores, [score for *_, score in expected], rtol=1e-12)
        assert all(
            np.array_equal(runs.to_mask(size), mask) for runs, (mask, *_) in zip(found.masks, expected, strict=True)
        )
        joined += sum(len(each[0]) for each in members) - len(found)
    assert joined > 100
