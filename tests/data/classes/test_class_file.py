"""`classes.yaml` beside the data: what it says reaches the data set, the model and the checkpoint."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from composed_data import load as load_data
from making import save
from mistakes import assert_refused
from omegaconf import OmegaConf
from PIL import Image

from dinoseg.config.nodes import instantiate
from dinoseg.config.plain import to_container
from dinoseg.config.stored import Source, compose_stored
from dinoseg.data.classes.file import NOT_DESCRIBED, read_class_file
from dinoseg.experiment.builder import Builder
from dinoseg.experiment.recipe import config_description
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import read_ids

LEAVES = """
classes:
  background: {ids: [0], color: [0, 0, 0]}
  leaf: {ids: [1, 2], color: [0, 255, 0]}   # merged
  "no": {ids: [9], color: [200, 0, 0]}
ignore: {ids: [7, 300]}
"""
OTHERS = "data.reader.masks.others="
COLOURED = """
masks: palette
classes:
  ground: {colors: [[0, 0, 0], [90, 60, 30]]}
  leaf: {color: [0, 255, 0]}
  stem: {color: [0, 128, 0], colors: [[0, 100, 0], [0, 90, 0]]}
ignore: {colors: [[255, 255, 255], [1, 2, 3]]}
"""


@pytest.fixture
def load(compose):
    """Compose the config of data in a folder, as the command line does."""
    return lambda root: compose("data=folder", f"data.root='{root}'")


def describe(root, text):
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.yaml").write_text(text)
    return root


def put(root, pixels, name="x", **options):
    """Write an image and its mask into both splits."""
    for split in ("train", "val"):
        save(root / f"{split}/images/{name}.png", np.zeros((*np.shape(pixels)[:2], 3)))
        save(root / f"{split}/masks/{name}.png", pixels, **options)


def data_of(root, *overrides):
    """Compose the data alone."""
    return load_data("folder", root, *overrides)


def mask_of(data, split="val", number=0):
    return instantiate(data.reader)(split=split).mask(number)


def test_ids_are_merged_and_ignored(load, tmp_path):
    describe(tmp_path, LEAVES)
    put(tmp_path, [[0, 1, 2], [9, 7, 255], [2, 300, 0]], dtype=np.uint16)
    cfg = load(tmp_path)
    assert cfg.data.num_classes == cfg.head.num_classes == 3
    data = instantiate(cfg.data.reader)(split="val")
    assert data.classes == ("background", "leaf", "no") and data.palette == ((0, 0, 0), (0, 255, 0), (200, 0, 0))
    np.testing.assert_array_equal(data.mask(0), [[0, 1, 1], [2, 255, 255], [1, 255, 0]])
    for foreign in (3, 301):  # neither a position beyond the classes nor a number that nobody named is a class
        put(tmp_path, [[0, foreign]], dtype=np.uint16)
        assert_refused(lambda: data.mask(0), f"ids {foreign}, ", "stored in files as 0, 1, 2, 9, ", "classes.yaml")


def test_any_id_can_be_a_class(tmp_path):
    put(tmp_path, [[0, 1, 2, 3, 255, 40000]], dtype=np.uint16)
    for text, expected in (
        ("classes: [ground, person]\nothers: person", [0, 1, 1, 1, 255, 1]),
        ("classes: [ground, person]\nothers: ground", [0, 1, 0, 0, 255, 0]),
        ("classes: {ground: {ids: [2]}, person: }\nothers: person\nignore: {ids: [3]}", [1, 1, 0, 255, 255, 1]),
        ("classes: {ground: {ids: [0]}, dog: {ids: [2]}, person: {ids: [9]}}\nothers: person", [0, 2, 1, 2, 255, 2]),
    ):
        describe(tmp_path, text)
        assert mask_of(data_of(tmp_path)).tolist() == [expected], text
    assert mask_of(data_of(tmp_path, "data.classes=[a,b]", OTHERS + "b")).tolist() == [[0, 1, 1, 1, 255, 1]]
    words = f"{OTHERS}c is not a class. Name one of data.classes: a, b"
    assert_refused(lambda: mask_of(data_of(tmp_path, "data.classes=[a,b]", OTHERS + "c")), words)


def test_positions_are_no_classes_if_ids_are_given(tmp_path):
    describe(tmp_path, "classes: {a: {ids: [10]}, b: {ids: [20, 255]}}")
    put(tmp_path, [[10, 20], [255, 10]])
    data = instantiate(data_of(tmp_path, "data.ignore_index=254").reader)(split="train")
    np.testing.assert_array_equal(data.mask(0), [[0, 1], [1, 0]])
    put(tmp_path, [[10, 1]])
    assert_refused(lambda: data.mask(0), "holds the ids 1, which are not classes")
    assert read_class_file(tmp_path / "classes.yaml", 1)["ids"] == {10: 0, 20: 1, 255: 1, 0: -1}


@pytest.mark.parametrize("indexed", [False, True])
def test_colours_are_merged_and_ignored(tmp_path, indexed):
    describe(tmp_path, COLOURED)
    colours = [(0, 0, 0), (90, 60, 30), (0, 255, 0), (0, 128, 0), (0, 100, 0), (0, 90, 0), (255, 255, 255), (1, 2, 3)]
    pick = np.random.default_rng(3).permutation(np.arange(48) % 8).reshape(6, 8)
    put(tmp_path, np.array(colours, np.uint8)[pick])
    if indexed:
        file = tmp_path / "val/masks/x.png"
        Image.fromarray(read_ids(file)).quantize(16).save(file)
    data = instantiate(data_of(tmp_path).reader)(split="val")
    assert data.classes == ("ground", "leaf", "stem") and data.palette == ((0, 0, 0), (0, 255, 0), (0, 128, 0))
    np.testing.assert_array_equal(data.mask(0), np.array([0, 0, 1, 2, 2, 2, 255, 255])[pick])
    put(tmp_path, [[[0, 100, 1]]])
    assert_refused(lambda: data.mask(0), "colours that are not in classes.yaml: (0, 100, 1)")


def test_class_file_supports_plain_names_and_binary_masks(tmp_path):
    describe(tmp_path, "\ufeffclasses: [sea, land]\nignore: {ids: [3]}\n")
    put(tmp_path, [[0, 1, 3, 255]])
    data = instantiate(data_of(tmp_path).reader)(split="train")
    np.testing.assert_array_equal(data.mask(0), [[0, 1, 255, 255]])
    assert data.classes == ("sea", "land")
    describe(tmp_path, "classes: [sea, land]\nmasks: binary")
    put(tmp_path, [[0, 255]])
    np.testing.assert_array_equal(mask_of(data_of(tmp_path)), [[0, 1]])
    describe(tmp_path, "classes: [a]\nmasks: binary")
    assert data_of(tmp_path).num_classes == 1  # with task=multilabel


def test_command_line_overrides_the_class_file(tmp_path):
    describe(tmp_path, "my own: {format: [of, classes]}")
    put(tmp_path, [[0, 1, 255]])
    data = data_of(tmp_path, "data.classes=[a,b]")
    assert data.num_classes == 2 and data.palette is None
    np.testing.assert_array_equal(mask_of(data), [[0, 1, 255]])
    describe(tmp_path, LEAVES)
    reader = instantiate(data_of(tmp_path, "data.palette=[[1,1,1],[2,2,2],[3,3,3]]").reader)(split="train").reader
    assert reader.labels.palette[2] == (3, 3, 3) and reader.masks.ids[2] == 1


def test_ids_of_the_command_line_never_replace_those_of_the_file(tmp_path):
    put(tmp_path, [[0, 1, 255]])
    ids = "data.reader.masks.ids={3: 255}"
    for text in ("classes: {land: {ids: [1]}, sea: {ids: [0]}}", "classes: [land, sea]"):
        describe(tmp_path, text)
        assert_refused(lambda: mask_of(data_of(tmp_path, ids)), "masks.ids={3: 255} would replace ", "`ignore: {ids: ")
    both = data_of(tmp_path, ids, "data.classes=[a,b]").reader
    assert instantiate(both)(split="train").reader.masks.ids == {3: 255}


def test_built_in_datasets_ignore_a_class_file(tmp_path):
    describe(tmp_path, "not: {ours: 1}")
    for name, masks in (("camvid", {"ids": {11: 255}}), ("ade20k", {"reduce_zero_label": True})):
        found = to_container(load_data(name, tmp_path).reader.masks, resolve=True)
        assert found == {**found, **masks, "format": "ids", "colors": None, "ignore_colors": []}
    assert load_data("person", tmp_path).palette == [[0, 0, 0], [0, 255, 0]]


def test_missing_classes_and_file_are_reported(load, tmp_path):
    words = (f"No folder {tmp_path}/train/images ", ". data.classes is not set. ", ": data.classes=[background,leaf]. ")
    words += (f"Or write them into {tmp_path}/classes.yaml: `classes:",)
    cfg = load(tmp_path)
    assert_refused(lambda: cfg.data.classes, *words)
    assert_refused(lambda: cfg.head.num_classes, *words)
    assert_refused(lambda: instantiate(cfg.data.reader), *words)
    assert_refused(lambda: instantiate(cfg.head), *words)
    assert config_description(Builder(cfg))["config"]["data"]["classes"] == "???"
    describe(tmp_path, "[1]")
    assert_refused(lambda: load(tmp_path).data.num_classes, "classes.yaml: the file has [1]")


@pytest.mark.parametrize(
    ("root", "problem"),
    [
        ("nowhere", "data.root=nowhere: file or folder not found. Give the folder that holds the dataset. "),
        ("flat", "No folder flat/train/images for split train (pattern {split}/images). flat holds the folders images"),
        ("split", "data.classes is not set. Give the class names in id order: "),
    ],
)
def test_dataset_without_classes_reports_root_and_folders_first(load, tmp_path, monkeypatch, root, problem):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "split", [[0]])
    for name in ("images", "masks"):
        save(tmp_path / f"flat/{name}/a.png", np.zeros((4, 4, 3)))
    classes = "data.classes is not set. Give the class names in id order: data.classes=[background,leaf]. Or write"
    assert assert_refused(lambda: instantiate(load(root).data.reader), classes).startswith(problem)


def test_checkpoint_stores_the_values_of_the_class_file(load, tmp_path):
    for text in (LEAVES, COLOURED):
        describe(tmp_path, text)
        cfg = load(tmp_path)
        before = instantiate(cfg.data.reader)
        kept = json.loads(json.dumps(config_description(Builder(cfg))))
        (tmp_path / "classes.yaml").unlink()
        put(tmp_path, [[0]])
        again = OmegaConf.create({**to_container(cfg), **compose_stored(kept, Source("resume=file"))})
        assert again.head.num_classes == again.data.num_classes == 3
        first, second = (reader(split="val").reader for reader in (before, instantiate(again.data.reader)))
        assert (first.labels, first.masks) == (second.labels, second.masks)
    text = json.dumps(kept["config"])
    assert "class_file" not in text and "${" not in text
    kept["config"]["data"]["classes"] = "${dinoseg.class_file:classes}"
    assert_refused(lambda: compose_stored(kept, Source("resume=file")), "is refused: saved configs set no key")


def test_a_changed_file_is_read_again(tmp_path):
    file = describe(tmp_path, "classes: [a, b]") / "classes.yaml"
    os.utime(file, ns=(1, 1))
    assert read_class_file(file, 255)["classes"] == ["a", "b"]
    file.write_text("classes: [a, c]")  # of the same length
    os.utime(file, ns=(1, 1))
    assert read_class_file(file, 255) == {**NOT_DESCRIBED, "classes": ["a", "c"], "described": {"ids": None}}
    gone = tmp_path / "gone"
    assert_refused(lambda: read_class_file(gone, 255), "Cannot read ", "No such file", "gone")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file has None: give a mapping with the keys classes, background, things, others, ignore, masks"),
        ("[a, b]", "give a mapping"),
        (
            "clases: [a]",
            "the file has 'clases': give a mapping with the keys classes, background, things, others, ignore, masks",
        ),
        ("masks: ids", "classes is None: list names in id order"),
        ("classes: {}", "classes is {}"),
        ("classes: leaf", "classes is 'leaf': list names"),
        ("classes: [a, b, a]", "classes names a more than once"),
        ("classes:\n  a: {ids: [0]}\n  a: {ids: [1]}", "a occurs more than once in one mapping"),
        ("classes: [a, no]", "False is not a name: write text, in quotes if YAML"),
        ("classes: {1: {ids: [0]}}", "1 is not a name"),
        ("classes: ['${oc.env:HOME}', b]", "'.{oc.env:HOME}' is not a name"),
        ("classes: ['???', b]", "'...' is not a name: .* no ... or"),
        ("classes: {' ': {ids: [0]}}", "' ' is not a name"),
        ("classes: {a: 0, b: 1}", "class a has 0: give a mapping with the keys ids, color"),
        ("classes: {a: {id: [0]}}", "with `masks: ids`, class a has 'id': give a mapping with the keys ids, color"),
        ("classes: {a: {ids: 0}}", "ids of class a is 0: give a list"),
        ("classes: {a: {ids: [[0]]}}", "unhashable type: 'list'. Correct the file"),
        ("classes: {a: {ids: [0]}, b: }", "no ids for b: give ids to every class, or to none"),
        ("classes: {a: {ids: [0, 1]}, b: {ids: [1]}}", "1 is given for a and for b"),
        ("classes: [a, b]\nignore: {ids: [1]}", "1 is given for b and for ignore"),
        ("classes: [a]\nignore: [7]", "ignore has .7.: give a mapping with the keys ids"),
        ("classes: [a]\nignore: {colors: [[0, 0, 0]]}", "with `masks: ids`, ignore has 'colors'"),
        ("classes: [a]\nignore: {color: [0, 0, 0]}", "ignore has 'color'"),
        ("classes: [a]\nmasks: rgb", "masks: 'rgb' is unknown: choose one of ids, palette, binary"),
        ("classes: [a, b]\nmasks: palette", "no color for a, b: give one to every class"),
        ("classes: {a: , b: {color: [9, 9, 9]}}\nmasks: binary", "no color for a: give one to every class or to none"),
        ("classes: {a: {color: [0, 0]}}", "three whole numbers"),
        ("classes: {a: {color: [0, 0, 256]}}", r"Colour \[0, 0, 256\]"),
        ("classes: {a: {color: red}}", "color of class a is 'red': give a list"),
        ("classes: {a: {colors: [0, 0, 0]}}\nmasks: palette", "Colour 0: give three"),
        ("classes: {a: {colors: [[1, 1, 1]]}}", "with `masks: ids`, class a has 'colors'"),
        ("classes: {a: {ids: [0], color: [0, 0, 0]}}\nmasks: palette", "with `masks: palette`, class a has 'ids'"),
        ("classes: [a, b]\nmasks: binary\nignore: {ids: [3]}", "ignore has 'ids': give a mapping with the keys none"),
        ("classes: {a: {labels: [no]}}\nmasks: labels", "False is not a name"),
        ("classes: [a, b]\nmasks: labels\nignore: {labels: [b]}", "'b' is given for b and for ignore"),
        ("classes: [a, b]\nothers: c", "others: 'c' is not a class: name one of a, b"),
        ("classes: [a, b]\nbackground: c", "background: 'c' is not a class: name one of a, b"),
        ("classes: [a, b]\nthings: [b, c]", "things: .* is not a list of classes: name some of a, b"),
        ("classes: [a, b]\nthings: ab", "things: 'ab' is not a list of classes: name some of a, b"),
        ("classes: ['0', '1']\nbackground: 1", "background: 1 is not a class"),
        ("classes: [a]\nignore: {ids: ['1', '1']}", "'1' is given for ignore and for ignore"),
        ("classes: [a, b]\nthings: 3", "things: 3 is not a list of classes: name some of a, b"),
        ("classes: [a, b]\nthings: [[a]]", "things: .* is not a list of classes: name some of a, b"),
        ("classes: {a: {ids: [0]}, b: , c: }\nothers: c", "no ids for b: give ids"),
        ("classes: [a", "it is not plain YAML: .*Correct the file"),
        ("classes: !!python/name:os.system ''", "it is not plain YAML: .*python/name:os.system.*Correct the file"),
    ],
)
def test_invalid_class_file_is_refused(tmp_path, text, message):
    file = tmp_path / "classes.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_class_file(file, 255)
    assert str(file) in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("classes: {a: {ids: [65536]}, b: {ids: [1]}}", "masks.ids maps 65536 to 0: map numbers from 0 to 65535"),
        ("classes: {a: {ids: [x]}, b: {ids: [1]}}", "masks.ids maps 'x' to 0"),
        ("classes: {a: {ids: [yes]}, b: {ids: [2]}}", "masks.ids maps True to 0"),
        ("classes: {a: {color: [1, 1, 1]}, b: {color: [1, 1, 1]}}\nmasks: palette", "Colour (1, 1, 1) is used twice"),
        ("classes: [a, b]\nmasks: binary\nothers: b", "others has no effect with data.reader.masks.format=binary"),
    ],
)
def test_contents_that_do_not_fit_masks_are_refused(tmp_path, text, words):
    describe(tmp_path, text)
    put(tmp_path, [[0]])
    assert_refused(lambda: mask_of(data_of(tmp_path)), words)


def test_documented_class_files_are_valid(load, tmp_path):
    page = (Path(__file__).parents[3] / "docs/own_data.md").read_text()
    numbers, colours = re.findall(r"```yaml\n(classes:.*?)```", page, flags=re.S)
    put(describe(tmp_path / "numbers", numbers), [[0, 1, 2, 7]])
    put(describe(tmp_path / "colours", colours), [[[0, 0, 0], [0, 255, 0], [0, 128, 0], [255, 255, 255]]])
    for name, classes in (("numbers", ("background", "leaf")), ("colours", ("background", "plant"))):
        data = instantiate(load(tmp_path / name).data.reader)(split="train")
        assert data.classes == classes and data.palette == ((0, 0, 0), (0, 255, 0))
        assert data.mask(0).tolist() == [[0, 1, 1, 255]]
