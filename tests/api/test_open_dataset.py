"""Datasets for a caller's own DataLoader: items, labels, workers and mistakes."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from making import save
from overlapping_shapes import write_overlaps
from PIL import Image
from torch.utils.data import DataLoader

import dinoseg
from dinoseg.utils.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for split, names in (("train", "abcde"), ("val", "x")):
        for name in names:
            save(folder / split / "images" / f"{name}.png", rng.integers(0, 256, (20, 30, 3)))
            save(folder / split / "masks" / f"{name}.png", rng.choice([0, 1, 255], (20, 30)))
    return folder


def crop(item):
    """Return the top left of an item, at module level so that workers can import it."""
    return {**item, "image": item["image"][:, :8, :8], "mask": item["mask"][:8, :8], "seen": True}


def test_items_are_images_masks_and_names(root):
    data = dinoseg.open_dataset(root=root, classes=["ground", "leaf"])
    assert (len(data), data.num_classes, data.classes, data.ignore_index) == (5, 2, ("ground", "leaf"), 255)
    assert len(data.palette) == 2 and data.names == tuple("abcde") and "5 items, 2 classes" in repr(data)
    item = data[0]
    assert item["image"].shape == (3, 20, 30) and item["image"].dtype == item["mask"].dtype == torch.uint8
    assert item["mask"].shape == (20, 30) and {*item["mask"].unique().tolist()} == {0, 1, 255} and item["name"] == "a"
    assert data[-1]["name"] == "e" and [each["name"] for each in data] == [*"abcde"]
    with pytest.raises(IndexError):
        data[5]
    assert len(dinoseg.open_dataset(root=root, classes=["ground", "leaf"], split="val")) == 1


def test_transform_and_config_keys_are_accepted(root):
    options = {"palette": [[0, 0, 0], [9, 9, 9]], "reader": {"masks": {"ids": {0: 1, 1: 0}}}}
    data = dinoseg.open_dataset(root=root, classes=["leaf", "ground"], transform=crop, **options)
    assert data[0]["seen"] and data[0]["image"].shape == (3, 8, 8) and data.palette[1] == (9, 9, 9)
    plain = dinoseg.open_dataset(root=root, classes=["ground", "leaf"], transform=crop)
    assert torch.equal(data[0]["mask"] == 0, plain[0]["mask"] == 1)


def test_a_class_file_in_the_folder_names_the_classes(root, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(root / split)
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
        {"data/pixels": "files", "data.pixels.value_range": [0, 4095]},
        {"data/pixels": "files", "pixels": {"value_range": [0, 4095]}},
    ],
)
def test_options_of_nested_groups_are_chosen_in_any_spelling(spelling, tmp_path):
    save(tmp_path / "train/masks/a.png", np.ones((4, 6)))
    (tmp_path / "train/images").mkdir()
    Image.fromarray(np.full((4, 6), 4095, np.uint16)).save(tmp_path / "train/images/a.png")
    item = dinoseg.open_dataset(root=tmp_path, classes=["ground", "leaf"], channels=1, **spelling)[0]
    assert item["image"].dtype == torch.uint16 and item["image"].int().unique().tolist() == [65535]


@pytest.mark.parametrize(("channels", "most"), [(1, 200), (3, 4095)])
def test_items_predict_as_their_files_with_a_value_range(channels, most, tmp_path):
    save(tmp_path / "train/masks/a.png", np.ones((32, 48)))
    values = np.random.default_rng(0).integers(0, most, (32, 48, channels)).astype(np.uint16)
    (tmp_path / "train/images").mkdir()
    file = tmp_path / "train/images/a.npy"
    np.save(file, values)
    options = {"classes": ["ground", "leaf"], "data": {"channels": channels, "pixels": WIDE}}
    item = dinoseg.open_dataset(root=tmp_path, **options)[0]
    model = dinoseg.create_model("rgb", **options)
    of_file, of_array, of_item, of_batch = model.predict([file, values, item["image"], *item["image"][None]])
    assert of_file.image.max() == round((most - 1) / 4095 * 65535)
    for found in (of_array, of_item, of_batch):
        assert np.array_equal(found.probabilities, of_file.probabilities)


def test_a_nested_option_that_is_missing_is_written_out(root):
    with pytest.raises(UserError) as caught:
        dinoseg.open_dataset(root=root, classes=["ground", "leaf"], pixels={"value_range": [0, 4095]})
    assert 'Write data={"pixels": {"name": "files", "value_range": [0, 4095]}}, or' in str(caught.value)


def test_opening_a_dataset_writes_nothing(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dinoseg.open_dataset(root=root, classes=["ground", "leaf"])[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", [pytest.param("spawn", marks=pytest.mark.heavy), "fork"])
def test_workers_of_a_loader_read_it(root, method):
    data = dinoseg.open_dataset(root=root, classes=["ground", "leaf"], transform=crop)
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[2]["image"], data[2]["image"]) and again.classes == data.classes
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        batches = list(DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context=method))
    assert [batch["image"].shape for batch in batches] == [(2, 3, 8, 8), (2, 3, 8, 8), (1, 3, 8, 8)]
    assert [name for batch in batches for name in batch["name"]] == [*"abcde"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"root": "nowhere"}, "nowhere"),
        ({"name": "foldr"}, "data=foldr is unknown. Did you mean data=folder"),
        ({"split": "training"}, "split=training is unknown. Choose one of train, val, test"),
        ({"classes": None}, "classes is not set|classes are not set"),
        ({"classes": ["only"]}, "1"),
        ({"nonsense": 1}, "data.nonsense is not a key"),
        ({"batch_size": 2}, "^batch_size has no effect"),
        ({"labelled": 0.5}, "^labelled has no effect"),
        ({"augment": {"flip": 0}}, "^augment has no effect"),
        ({"data": {"augment": {"color": "photometric"}}}, "^augment has no effect"),
        ({"value_range": [0, 1]}, r'data.pixels.value_range is one, with data={"pixels": "files"}'),
        ({"pixels": "file"}, r'data={"pixels": "file"} is unknown. Did you mean data={"pixels": "files"}'),
        ({"a/b": 1}, "data.a/b is not the name of a key"),
    ],
)
def test_mistakes_are_refused(root, arguments, message):
    with pytest.raises(UserError, match=message):
        [*dinoseg.open_dataset(**{"root": root, "classes": ["ground", "leaf"], **arguments})]
