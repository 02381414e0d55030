"""A data set class from outside the package, with the six members of the contract and nothing else."""

import json

import numpy as np
import pytest
import torch
from command_line import SMALL, call
from making import Pictures
from mistakes import assert_refused, refusals

from dinoseg.core.sample_maps import ValueMap
from dinoseg.data.custom import CustomDataset, check_custom_dataset
from dinoseg.data.opened import prepare_dataset

YAML = """
defaults: [_common, _self_]
classes: [a, b, c]
root: none
reader:
  _target_: test_custom.open_pictures
  _partial_: true
"""


class Brighter(Pictures):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "image": sample["image"].clamp(max=252) + 3}


def open_pictures(split):
    return Pictures([(32, 48)] * 6) if split == "train" else Brighter([(32, 48)] * 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("own")
    (where / "own/data").mkdir(parents=True)
    (where / "own/data/pictures.yaml").write_text(YAML)
    (where / "own/data/bare.yaml").write_text(YAML.partition("reader:")[0] + "reader:\n")
    return where


def run(folder, *words):
    small = [word for word in SMALL if not word.startswith("data.") and word != "data=folder"]
    return call(folder, "--config-dir", "own", "data=pictures", "data.batch_size=2", *small, *words)


def check_bare_reader(folder, mode):
    done = run(folder, "data=bare", f"mode={mode}")
    assert done.status == 1 and "data.reader: its YAML file must set `_target_" in done.err, done.err
    assert "Traceback" not in done.err


@pytest.mark.heavy
def test_custom_dataset_is_planned(folder):
    done = run(folder, "mode=plan")
    assert done.status == 0, done.err
    check_bare_reader(folder, "doctor")


def test_the_doctor_reads_its_samples(folder):
    done = run(folder, "mode=doctor", "hydra.run.dir=doctor")
    report = json.loads((folder / "doctor/doctor.json").read_text())
    assert [report["splits"][split]["images"] for split in ("train", "val")] == [6, 2], done.err
    codes = {finding["code"] for finding in report["findings"]}
    assert "near_duplicate_across_splits" in codes and not codes & {"unreadable_image", "same_files"}
    check_bare_reader(folder, "train")


IMAGE = torch.zeros(3, 4, 5, dtype=torch.uint8)
MASK = torch.tensor([[0, 1, 255, 0, 1]] * 4)
WHOLE = {
    "classes": ["a", "b"],
    "palette": [(0, 0, 0), (9, 9, 9)],
    "ignore_index": 255,
    "names": ["x", "y"],
    "__len__": lambda self: 2,
    "__getitem__": lambda self, index: {"image": IMAGE, "mask": MASK, "name": self.names[index]},
}


def dataset(channels=3, **changes):
    """Return a function that opens a data set with the members of the contract, some changed."""
    return lambda: CustomDataset(type("Part", (), WHOLE | changes)(), channels=channels)


def read(item, maps=()):
    return lambda: dataset(__getitem__=lambda self, index: item, maps=dict(maps))()[0]


def read_changed(maps_of_dataset=(), **changes):
    return read({"image": IMAGE, "mask": MASK, "name": "x"} | changes, maps_of_dataset)


def configured(classes=("a", "b"), ignore_index=255):
    return lambda: check_custom_dataset(type("Part", (), WHOLE)(), list(classes), ignore_index)


def prepared(**options):
    return lambda: prepare_dataset(dataset()(), split="train", **options)


test_message_names_value_and_remedy = refusals(
    {
        "a name twice": (dataset(names=["x", "x"]), "has 2 samples and 1 name in `names`"),
        "a name too few": (dataset(names=["x"]), "has 2 samples and 1 name in `names`"),
        "numbers as names": (dataset(names=[0, 1]), "has 2 samples and 2 names in `names`", "unique text as name"),
        "one color": (dataset(palette=[(0, 0, 0)]), "data.palette has 1 colours for 2 classes"),
        "ignored": (dataset(ignore_index=256), "data.ignore_index=256: give an id from 0 to 255"),
        "ignored text": (dataset(ignore_index="255"), "data.ignore_index='255': give an id from 0 to 255"),
        "ignored fraction": (dataset(ignore_index=255.5), "data.ignore_index=255.5: give an id from 0 to 255"),
        "no maps": (read_changed({"depth": ValueMap()}, maps=None), "the sample x: the map depth is NoneType"),
        "empty": (dataset(names=[], __len__=lambda self: 0), "has 0 samples and 0 names"),
        "tuple": (read((IMAGE, MASK)), "the sample 'x' is tuple. Return a dict of image, mask and name"),
        "no name": (read({"image": IMAGE, "mask": MASK}), "the sample 'x' has the name None"),
        "another name": (read_changed(name="y"), "the sample 'x' has the name 'y'"),
        "floats": (read_changed(image=IMAGE.float()), "image of x is float32 (3, 4, 5). Return a tensor"),
        "array": (read_changed(image=np.zeros((4, 5, 3))), "image of x is ndarray"),
        "mask of floats": (read_changed(mask=MASK.float()), "mask of x is float32 (4, 5). Return an integer"),
        "turned mask": (read_changed(mask=MASK.T), "mask of x is int64 (5, 4). Return an integer ", "(4, 5)"),
        "ids": (read_changed(mask=MASK * 2), "mask of x holds 2, 510. Return ids from 0 to 1, or 255"),
        "other classes": (configured(("a", "c")), "but the data set of data.reader has"),
        "other ignored id": (configured(ignore_index=254), "but the data set of data.reader has"),
        "skipped": (prepared(on_error="skip"), "on_error=skip", " need a reader that returns a ", "PairDataset"),
        "packed": (prepared(cache="packed"), "cache=packed", " need a reader that returns a ", "PairDataset"),
    }
)


def test_custom_dataset_that_agrees_with_the_config_is_read():
    data = configured()()
    assert data[1]["mask"].dtype == torch.uint8 and torch.equal(data[1]["mask"].long(), MASK)
    assert prepare_dataset(data, split="train", labelled=0.5).names in (["x"], ["y"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_images_have_the_declared_channels(dtype):
    item = {"image": torch.zeros(4, 4, 5, dtype=dtype), "mask": MASK, "name": "x"}
    data = dataset(channels=4, __getitem__=lambda self, index: item)()
    assert data[0]["image"] is item["image"] and data.keep({"x"})[0]["image"] is item["image"]
    assert_refused(read(item), "Return a tensor (3, H, W) of uint8, or of uint16")
