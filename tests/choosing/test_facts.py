"""What is known of a data set: sizes, rarity, and how thin classes are."""

import numpy as np
import pytest
from command_line import write_data

from dinoseg.choosing.facts import ClassFacts, Facts, facts_of, median_width, parts_of


def widths(mask, num_classes=2):
    return [(id, width) for id, width, _ in parts_of(mask, num_classes)]


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
def test_lines_are_as_wide_as_they_are(width):
    upright = np.zeros((40, 60), np.uint8)
    upright[:, 20 : 20 + width] = 1
    found = dict(widths(upright))
    assert abs(found[1] - width) <= 1
    assert abs(dict(widths(upright.T.copy()))[1] - width) <= 1


def test_parts_agree_with_distances_of_every_pair_of_pixels():
    draw = np.random.default_rng(0)
    for shape in ((9, 13), (1, 7), (16, 16)):
        mask = draw.choice([0, 1, 255], size=shape, p=[0.7, 0.2, 0.1]).astype(np.uint8)
        for id in (0, 1):
            inside, outside = np.argwhere(mask == id), np.argwhere(mask != id)
            apart = np.sqrt(((inside[:, None] - outside[None]) ** 2).sum(-1)).min(1)  # of each pixel of the class
            found = [row for row in parts_of(mask, 2) if row[0] == id]
            assert sum(row[2] for row in found) == len(inside)
            assert max(row[1] for row in found) == pytest.approx(min(2 * apart.max() - 1, min(shape)), abs=1e-4)


@pytest.mark.parametrize("value", [0, 255])
def test_a_mask_of_one_value_has_one_part_or_none(value):
    mask = np.full((5, 8), value, np.uint8)
    assert widths(mask) == ([(0, 5.0)] if value == 0 else [])
    assert widths(np.full((1, 1), value, np.uint8)) == ([(0, 1.0)] if value == 0 else [])


def test_the_median_counts_pixels_and_not_parts():
    assert median_width(np.array([[1, 2.0, 10], [1, 30.0, 900], [1, 4.0, 20]])) == 30
    assert median_width(np.array([[1, 2.0, 10]])) == 2
    assert np.isnan(median_width(np.empty((0, 3))))


def test_thin_and_rare_classes_come_first_and_absent_ones_are_neither():
    classes = (
        ClassFacts("sky", 0.9, 200.0),
        ClassFacts("pole", 0.004, 3.0),
        ClassFacts("wire", 0.002, 5.0),
        ClassFacts("none", 0.0, float("nan")),
    )
    facts = Facts(10, 5, (360, 480), classes)
    assert [each.name for each in facts.thinner(8)] == ["pole", "wire"]
    assert [each.name for each in facts.rarer(0.01)] == ["wire", "pole"]
    assert facts.absent == ["none"]


def test_a_data_set_of_files_is_looked_at(tmp_path, compose):
    write_data(tmp_path / "data", train=3, val=2, size=(20, 31))
    from dinoseg import build

    cfg = compose("data=folder", f"data.root={tmp_path}/data", "data.classes=[dark,bright,none]")
    train, val = build.dataset(cfg, "train"), build.dataset(cfg, "val")
    facts = facts_of(train, val, tmp_path / "cache")
    shares = np.bincount(np.concatenate([train[i]["mask"].numpy().ravel() for i in range(3)]), minlength=3) / (3 * 620)
    assert (facts.images, facts.val_images, facts.size) == (3, 2, (20, 31))
    assert [each.share for each in facts.classes] == pytest.approx(shares.tolist())
    assert facts.absent == ["none"] and np.isnan(facts.classes[2].width)
