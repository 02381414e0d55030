"""What the doctor says of masks that count objects or are coloured: its line, pasted, makes them readable."""

import re
import shlex

import numpy as np
import pytest
from composed_data import load
from doctor_sets import findings_by_code
from making import save

from dinoseg.config.nodes import instantiate
from dinoseg.data.classes.masks import Masks

COLORS = np.array([[0, 0, 0], [255, 0, 0], [0, 128, 0]], np.uint8)
DESCRIBED = Masks(described={"ids": None})


def write(root, masks):
    for split in ("train", "val"):
        for number, mask in enumerate(masks):
            image = np.random.default_rng([number, split == "val"]).integers(0, 256, (*np.shape(mask)[:2], 3))
            save(root / split / "images" / f"{number}.png", image.astype(np.uint8))
            save(root / split / "masks" / f"{number}.png", np.asarray(mask, np.uint8))
    return root


def remedy_and_line(root, classes, masks=Masks()):  # noqa: B008 (frozen)
    """Return the remedy for foreign ids, and what stands in it to be pasted."""
    finding = findings_by_code(root, options={"classes": classes, "palette": None, "masks": masks})["foreign_ids"]
    assert finding.severity == "error"
    return finding.remedy, re.search("`(.*?)`", finding.remedy, re.DOTALL)[1]


def read(root, *words):
    data = load("folder", root, *words)
    return [instantiate(data.reader)(split="train").mask(number).tolist() for number in (0, 1)]


def count_objects(*rows):
    """Return a mask (12, 12) whose first rows hold these ids; the others are background."""
    mask = np.zeros((12, 12), np.uint8)
    for row, ids in enumerate(rows):
        mask[row, : len(ids)] = ids
    return mask


INSTANCES = [count_objects([0, 1, 2, 255]), count_objects([0, 1, 2, 7], [3, 4, 5, 6])]
MERGED = [count_objects([0, 1, 1, 255]).tolist(), count_objects([0, 1, 1, 1], [1, 1, 1, 1]).tolist()]


def test_instance_masks_get_a_remedy_that_merges_them(tmp_path):
    root = write(tmp_path / "data", INSTANCES)
    remedy, line = remedy_and_line(root, ["background", "person"])
    assert remedy.startswith("If they are classes, add their names to data.classes, in the order of the ids. ")
    assert "They may be instances. If each number is one person, add this to the command line:" in remedy
    assert read(root, "data.classes=[background,person]", *shlex.split(line)) == MERGED
    remedy, line = remedy_and_line(root, ["background", "person"], DESCRIBED)
    assert remedy.startswith("Correct the masks, or add the ids to classes.yaml of data.root: to their class, which ")
    line = re.search("`(others: .*?)`", remedy)[1]
    (root / "classes.yaml").write_text(f"classes: [background, person]\n{line}\n")
    assert read(root) == MERGED
    options = {"classes": ["background", "person"], "palette": None, "masks": Masks(others="person")}
    assert "foreign_ids" not in findings_by_code(root, options=options)


@pytest.mark.parametrize("name", ["null", "a person's", 'say "x"', "Käfer, rot", "x=[1]", "back\\slash"])
def test_suggested_line_works_for_any_class_name(tmp_path, name):
    root = write(tmp_path / "data", INSTANCES)
    _, line = remedy_and_line(root, ["background", name])
    (word,) = shlex.split(line)
    assert load("folder", root, "data.classes=[a,b]", word).reader.masks.others == name


@pytest.mark.parametrize(
    ("classes", "mask"),
    [
        ("ab", [[[0, 1, 2, 255]], [[0, 1, 255, 255]]]),  # a class that is not named
        ("ab", [count_objects([1, 2]), count_objects([1, 2, 3])]),  # few
        ("ab", [count_objects([1, 2, 3, 4, 5, 6])] * 2),  # as many in each
        ("ab", [count_objects(*(12 * [each] for each in range(1, last))) for last in (9, 12)]),  # large
        ("abc", INSTANCES),  # the first ones would be of the classes b and c
        ("ab", [count_objects([1, 4, 9, 16, 25]), count_objects([2, 4, 9])]),  # not counted
    ],
)
def test_ids_that_may_be_classes_are_to_be_named_first(tmp_path, classes, mask):
    root = write(tmp_path / "data", mask)
    options = {"classes": list(classes), "palette": None}
    remedy = findings_by_code(root, options=options)["foreign_ids"].remedy
    assert remedy.startswith("If they are classes, add their names") and "++data.reader.masks.ids" in remedy
    assert "instances" not in remedy and "masks.others" not in remedy


def test_many_numbers_with_gaps_may_be_instances_too(tmp_path):
    root = write(tmp_path / "data", [count_objects(range(3, 26, 2)), count_objects(range(33, 56, 2))])
    remedy, line = remedy_and_line(root, ["background", "person"])
    assert "do not look like class ids" in remedy and "If each number is one person" in remedy
    assert read(root, "data.classes=[background,person]", *shlex.split(line)) == [count_objects(12 * [1]).tolist()] * 2


@pytest.mark.parametrize(("number", "described"), [(2, False), (3, True), (3, False)])
def test_colour_masks_get_a_remedy_that_maps_them_to_classes(tmp_path, number, described):
    ids = np.array([[0, 0, 0, 1, 1, number - 1]])
    root = write(tmp_path / "data", [COLORS[ids], COLORS[ids[:, ::-1]]])
    remedy, line = remedy_and_line(root, ["background", "person"], DESCRIBED if described else Masks())
    words = ["data.classes=[background,person]", *shlex.split(line)]
    if described:
        (root / "classes.yaml").write_text(line)
        words = []
    assert read(root, *words)[0] == np.where(ids == 2, 255, ids).tolist()
    assert "(0, 0, 0) background, (255, 0, 0) person" in remedy
    assert ("(0, 128, 0) ignored" in remedy) == (number == 3) == ("name them all first" in remedy)


def test_colours_that_cannot_be_classes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3))
    for name, masks, words in (
        ("noise", noise, "There are more colours than classes"),
        ("few", [COLORS[[[0, 1]]]] * 2, "They hold 2 colours for 3 classes"),
    ):
        findings = findings_by_code(write(tmp_path / name, masks), options={"palette": None})
        assert words in findings["foreign_ids"].remedy
    root = write(tmp_path / "grey", [np.repeat(np.array([[0, 1, 5]])[..., None], 3, axis=2)] * 2)
    finding = findings_by_code(root, options={"classes": ["a", "b", "c"], "palette": None})["foreign_ids"]
    assert "5 (in 4)" in finding.message and "'++data.reader.masks.ids={5: 255}'" in finding.remedy
