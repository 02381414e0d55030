"""Datasets for a caller's own DataLoader: items, labels, workers and mistakes."""

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import link_all, write_data
from making import save
from mistakes import refusals
from overlapping_shapes import write_overlaps
from torch.utils.data import DataLoader

import dinoseg

pytestmark = pytest.mark.slow
CLASSES = ["ground", "leaf"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    for split, names in (("train", "abcde"), ("val", "x")):
        for name in names:
            save(folder / split / "images" / f"{name}.png", rng.integers(0, 256, (20, 30, 3)))
            save(folder / split / "masks" / f"{name}.png", rng.choice([0, 1, 255], (20, 30)))
    return folder


def crop(item):
    """Return the top left of an item, at module level so that workers can import it."""
    return {**item, "image": item["image"][:, :8, :8], "mask": item["mask"][:8, :8], "seen": True}


def test_items_are_images_masks_and_names(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = dinoseg.open_dataset(root=root, classes=CLASSES)
    assert (len(data), data.num_classes, data.classes, data.ignore_index) == (5, 2, ("ground", "leaf"), 255)
    assert len(data.palette) == 2 and data.names == tuple("abcde") and "5 items, 2 classes" in repr(data)
    item = data[0]
    assert item["image"].shape == (3, 20, 30) and item["image"].dtype == item["mask"].dtype == torch.uint8
    assert item["mask"].shape == (20, 30) and {*item["mask"].unique().tolist()} == {0, 1, 255} and item["name"] == "a"
    assert data[-1]["name"] == "e" and [each["name"] for each in data] == [*"abcde"]
    with pytest.raises(IndexError):
        data[5]
    assert len(dinoseg.open_dataset(root=root, classes=CLASSES, split="val")) == 1
    assert not list(tmp_path.iterdir())


def test_transform_and_config_keys_are_accepted(root):
    options = {"palette": [[0, 0, 0], [9, 9, 9]], "reader": {"masks": {"ids": {0: 1, 1: 0}}}}
    data = dinoseg.open_dataset(root=root, classes=["leaf", "ground"], transform=crop, **options)
    assert data[0]["seen"] and data[0]["image"].shape == (3, 8, 8) and data.palette[1] == (9, 9, 9)
    plain = dinoseg.open_dataset(root=root, classes=CLASSES, transform=crop)
    assert torch.equal(data[0]["mask"] == 0, plain[0]["mask"] == 1)


def test_a_class_file_in_the_folder_names_the_classes(root, tmp_path):
    link_all(root, tmp_path)
    (tmp_path / "classes.yaml").write_text("classes: [soil, plant]\n")
    assert dinoseg.open_dataset(root=tmp_path).classes == ("soil", "plant")


def test_multilabel_masks_have_a_layer_for_each_class(tmp_path):
    masks = write_overlaps(tmp_path)
    for task in ("multilabel", {"name": "multilabel", "threshold": 0.3}):
        data = dinoseg.open_dataset(root=tmp_path, classes=["disc", "square"], task=task)
        assert np.array_equal(data[0]["mask"], masks[data.names[0]])
    model = dinoseg.create_model("rgb", classes=data.classes, task="multilabel")
    assert model.palette == data.palette and (0, 0, 0) not in data.palette


WIDE = {"name": "files", "value_range": [0, 4095]}


@pytest.mark.parametrize(
    "spelling",
    [
        {"pixels": WIDE},
        {"pixels": "files", "pixels.value_range": [0, 4095]},
        {"data": {"pixels": WIDE}},
        {"data/pixels": "files", "pixels": {"value_range": [0, 4095]}},
    ],
)
def test_options_of_nested_groups_are_chosen_in_any_spelling(spelling, tmp_path):
    save(tmp_path / "train/masks/a.png", np.ones((4, 6)))
    save(tmp_path / "train/images/a.png", np.full((4, 6), 4095), np.uint16)
    item = dinoseg.open_dataset(root=tmp_path, classes=CLASSES, channels=1, **spelling)[0]
    assert item["image"].dtype == torch.uint16 and item["image"].int().unique().tolist() == [65535]


@pytest.mark.parametrize(("channels", "most"), [(1, 200), (3, 4095)])
def test_items_predict_as_their_files_with_a_value_range(channels, most, tmp_path):
    save(tmp_path / "train/masks/a.png", np.ones((32, 48)))
    values = np.random.default_rng(0).integers(0, most, (32, 48, channels)).astype(np.uint16)
    (tmp_path / "train/images").mkdir()
    file = tmp_path / "train/images/a.npy"
    np.save(file, values)
    options = {"classes": CLASSES, "data": {"channels": channels, "pixels": WIDE}}
    item = dinoseg.open_dataset(root=tmp_path, **options)[0]
    model = dinoseg.create_model("rgb", **options)
    of_file, *others = model.predict([file, values, item["image"], *item["image"][None]])
    assert of_file.image.max() == round((most - 1) / 4095 * 65535) and len(others) == 3
    assert all(np.array_equal(found.probabilities, of_file.probabilities) for found in others)


@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.heavy), "fork"])
def test_workers_of_a_loader_read_it(root, method):
    data = dinoseg.open_dataset(root=root, classes=CLASSES, transform=crop)
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[2]["image"], data[2]["image"]) and again.classes == data.classes
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        batches = list(DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=method))
    assert [batch["image"].shape for batch in batches] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    assert [name for batch in batches for name in batch["name"]] == [*"abcde"]


def open_with(**arguments):
    """Return a function that reads a folder with an image and its mask."""

    def act():
        write_data(Path(), train=1, val=0)
        [*dinoseg.open_dataset(**{"root": ".", "classes": CLASSES, **arguments})]

    return act


test_message_names_value_and_remedy = refusals(
    {
        "name": (open_with(name="foldr"), "data=foldr is unknown. Did you mean data=folder"),
        "split": (open_with(split="training"), "split=training is unknown. Choose one of train, val, test"),
        "one class": (open_with(classes=["only"]), "1"),
        "labelled": (open_with(labelled=0.5), "labelled has no effect"),
        "nested augmentation": (open_with(data={"augment": {"color": "photometric"}}), "augment has no effect"),
        "place of a key": (
            open_with(value_range=[0, 1]),
            "data.value_range is not a key of the config. Did you mean data.pixels.value_range",
        ),
        "option": (
            open_with(pixels="file"),
            "data/pixels=file is unknown. Did you mean data/pixels=files",
        ),
        "missing option": (
            open_with(pixels={"value_range": [0, 4095]}),
            "data.pixels.value_range=[0,4095]: data=folder lacks this key. Options that have it: data/pixels=files",
        ),
        "slash": (open_with(**{"a/b": 1}), "data.a/b is not a key"),
    }
)
