"""What is known of a data set: sizes, rarity, and how thin classes are."""

import numpy as np
import pytest
from command_line import SMALL, write_data
from making import Pictures
from overlapping_shapes import write_overlaps

from dinoseg.experiment.builder import Builder
from dinoseg.extensions.auto import facts
from dinoseg.extensions.auto.facts import ClassFacts, DatasetFacts, facts_of, headline, median_width, parts_of
from dinoseg.utils.images import write_png


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


@pytest.mark.parametrize(("size", "width"), [((5, 8), 5), ((1, 1), 1)])
def test_a_mask_of_one_value_has_one_part_or_none(size, width):
    assert [tuple(row) for row in parts_of(np.zeros(size, np.uint8), 2)] == [(0, width, size[0] * size[1])]
    assert not [*parts_of(np.full(size, 255, np.uint8), 2)]


def test_the_median_counts_pixels_and_not_parts():
    assert median_width(np.array([[1, 2.0, 10], [1, 30.0, 900], [1, 4.0, 20]])) == 30
    assert median_width(np.array([[1, 2.0, 10]])) == 2
    assert np.isnan(median_width(np.empty((0, 3))))


def test_thin_rare_and_absent_classes_are_listed():
    classes = [("sky", 0.9, 200.0), ("pole", 0.004, 3.0), ("wire", 0.002, 5.0), ("none", 0.0, float("nan"))]
    facts = DatasetFacts(10, 5, (360, 480), tuple(ClassFacts(*each) for each in classes))
    assert [each.name for each in facts.thinner(8)] == ["pole", "wire"]
    assert [each.name for each in facts.rarer(0.01)] == ["wire", "pole"]
    assert facts.absent == ["none"]


def test_facts_of_a_folder_dataset_are_measured(tmp_path, compose):
    write_data(tmp_path / "data", train=3, val=2, size=(20, 31))
    cfg = compose("data=folder", f"data.root={tmp_path}/data", "data.classes=[dark,bright,none]")
    train, val = Builder(cfg).dataset("train"), Builder(cfg).dataset("val")
    found = facts_of(train, val, tmp_path / "cache")
    shares = np.bincount(np.concatenate([train[i]["mask"].numpy().ravel() for i in range(3)]), minlength=3) / (3 * 620)
    assert (found.images, found.val_images, found.size) == (3, 2, (20, 31))
    assert [each.share for each in found.classes] == pytest.approx(shares.tolist())
    assert found.absent == ["none"] and np.isnan(found.classes[2].width)


def test_facts_of_a_reduced_store_use_the_original_files(tmp_path, compose):
    write_data(tmp_path / "data", train=3, val=2, size=(40, 60))
    lines = np.zeros((40, 60), np.uint8)
    lines[:, ::10] = 1
    for number in range(3):
        write_png(tmp_path / f"data/train/masks/{number}.png", lines)
    found = []
    for words in ((), ("data.cache=packed", "resolution.longest=30", "resolution.crop=[16,16]")):
        cfg = compose(*SMALL, f"data.root={tmp_path}/data", f"cache_dir={tmp_path}/cache", *words)
        train = Builder(cfg).dataset("train", reduced=True)
        found.append((train[0]["mask"].shape, facts_of(train, Builder(cfg).dataset("val"), tmp_path / "cache")))
    assert found[1][0] == (20, 30)
    assert found[0][1].size == found[1][1].size == (40, 60)
    assert [each.classes[1].width for _, each in found] == [1, 1] and found[0][1].classes[0].width > 7


def test_fewer_large_masks_are_measured(monkeypatch, tmp_path):
    measured = []
    monkeypatch.setattr(facts, "class_counts", lambda *_: np.array([1, 0, 0]))
    monkeypatch.setattr(facts, "parts_of", lambda mask, _: measured.append(mask) or [])

    def count_measured(size, length):
        measured.clear()
        facts_of(Pictures([size] * length), Pictures([size]), tmp_path)
        return len(measured)

    assert [count_measured((16, 16), length) for length in (1, 30, 200)] == [1, 30, 48]
    monkeypatch.setattr(facts, "_PIXELS", 16 * 16 * 24)
    assert [count_measured((16, 16), length) for length in (1, 30, 200)] == [1, 15, 24]
    assert [count_measured((64, 64), length) for length in (1, 7, 30, 200)] == [1, 7, 10, 8]


def test_facts_of_layers_are_those_of_each_class(tmp_path, compose):
    masks = write_overlaps(tmp_path / "data", train=4, val=2)
    words = ("data=folder", f"data.root={tmp_path}/data", "data.classes=[disc,square]", "task=multilabel")
    builder = Builder(compose(*words))
    found = facts_of(builder.dataset("train"), builder.dataset("val"), tmp_path / "cache")
    layers = np.stack([mask for name, mask in masks.items() if name.startswith("train")])  # (4, 2, H, W)
    assert found.has_layers and found.size == layers.shape[2:] and found.absent == []
    assert [each.share for each in found.classes] == pytest.approx(layers.mean(axis=(0, 2, 3)).tolist())
    for index, each in enumerate(found.classes):
        parts = [row for mask in layers for row in parts_of(mask[index].astype(np.uint8), 2) if row[0] == 1]
        assert each.width == median_width(np.array(parts))
    assert "2 classes that may overlap" in headline(found, 1, "cpu")
