"""A data set class from outside the package, with the six members of the contract and nothing else."""

import json
import sys

import numpy as np
import pytest
import torch
from command_line import SMALL, call

from dinoseg.data.custom import REQUIRED, CustomDataset, check_custom_dataset
from dinoseg.data.opened import prepare_dataset
from dinoseg.utils.errors import UserError

MODULE = '''
import torch


class Squares:
    """Bright squares on a dark ground."""

    palette = [[0, 0, 0], [255, 255, 0]]

    def __init__(self, root, split, *, classes, ignore_index):
        self.classes, self.ignore_index = classes, ignore_index
        self.names = [f"square/{index}" for index in range({"train": 6, "val": 2}[split])]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        mask = torch.zeros(32, 48, dtype=torch.int64)
        mask[8 : 20 + index, 10:30] = 1
        mask[0] = self.ignore_index
        noise = torch.randint(0, 40, (3, 32, 48), generator=torch.Generator().manual_seed(len(self) + index))
        image = (noise + 180 * (mask == 1)).to(torch.uint8)
        return {"image": image, "mask": mask, "name": self.names[index]}
'''
YAML = """
defaults: [_common, _self_]
classes: [ground, square]
root: none
reader:
  _target_: own_squares.Squares
  _partial_: true
  root: ${..root}
  classes: ${..classes}
  ignore_index: ${..ignore_index}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("own")
    (where / "own_squares.py").write_text(MODULE)
    (where / "own/data").mkdir(parents=True)
    (where / "own/data/squares.yaml").write_text(YAML)
    (where / "own/data/bare.yaml").write_text(YAML.partition("reader:")[0] + "reader:\n")
    sys.path.insert(0, str(where))
    yield where
    sys.path.remove(str(where))
    sys.modules.pop("own_squares", None)


def run(folder, *words):
    small = [word for word in SMALL if not word.startswith("data.") and word != "data=folder"]
    done = call(folder, "--config-dir", "own", "data=squares", "data.batch_size=2", *small, *words)
    return done


def test_custom_dataset_trains_evaluates_and_is_planned(folder):
    done = run(folder, "mode=train", "mode.report=false", "mode.pictures=0", "hydra.run.dir=run", "data.labelled=0.5")
    assert done.status == 0 and "3 of 6 images of split train" in done.err, done.err
    done = call(folder, "--config-dir", "own", "mode=eval", "resume=run", "engine=cpu", "engine.workers=0")
    assert done.status == 0, done.err
    scores = next(folder.glob("**/scores.json"))
    assert json.loads(scores.read_text())["pixels"] == 2 * 31 * 48
    done = run(folder, "mode=plan")
    assert done.status == 0, done.err


def test_the_doctor_reads_its_samples(folder):
    done = run(folder, "mode=doctor", "hydra.run.dir=doctor")
    report = json.loads((folder / "doctor/doctor.json").read_text())
    assert [report["splits"][split]["images"] for split in ("train", "val")] == [6, 2], done.err
    assert not any(finding["code"] in ("unreadable_image", "same_files") for finding in report["findings"])


def test_a_bare_reader_is_named(folder):
    for mode in ("train", "doctor"):
        done = run(folder, "data=bare", f"mode={mode}")
        assert done.status == 1 and "data=bare: `reader` must name a class or function" in done.err, done.err
        assert "Traceback" not in done.err


class Whole:
    classes, palette, ignore_index, names = ["a", "b"], [(0, 0, 0), (9, 9, 9)], 255, ["x", "y"]

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"image": torch.zeros(3, 4, 5, dtype=torch.uint8), "mask": torch.ones(4, 5), "name": self.names[index]}


@pytest.mark.parametrize("member", REQUIRED)
def test_each_missing_member_is_named(member):
    members = {name: getattr(Whole, name) for name in REQUIRED if name != member}
    with pytest.raises(UserError, match=rf"data.reader: .*Part lacks `{member}` \(.*\). Add it."):
        CustomDataset(type("Part", (), members)())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"names": ["x", "x"]}, "has 2 samples and 1 name in `names`"),
        ({"names": ["x"]}, "has 2 samples and 1 name in `names`"),
        ({"palette": None}, "`palette` needs an RGB color"),
        ({"palette": [(0, 0, 0)]}, "`palette` needs an RGB color for each of 2 classes"),
        ({"ignore_index": 256}, "`ignore_index` is 256. Give an integer from 0 to 255"),
        ({"names": [], "__len__": lambda self: 0}, "has no sample in this split"),
    ],
)
def test_members_that_do_not_fit_are_named(changes, said):
    with pytest.raises(UserError, match=said):
        CustomDataset(type("Part", (Whole,), changes)())


IMAGE, MASK = torch.zeros(3, 4, 5, dtype=torch.uint8), torch.tensor([[0, 1, 255, 0, 1]] * 4)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ((IMAGE, MASK), "the sample x is tuple. Return a dict of image, mask and name"),
        ({"image": IMAGE, "mask": MASK}, "the sample x lacks name"),
        ({"image": IMAGE, "mask": MASK, "name": "y"}, "the sample x has the name y"),
        ({"image": IMAGE.float(), "mask": MASK, "name": "x"}, r"image of x is float32 \(3, 4, 5\). Return a tensor"),
        ({"image": np.zeros((4, 5, 3)), "mask": MASK, "name": "x"}, "image of x is ndarray"),
        ({"image": IMAGE, "mask": MASK.float(), "name": "x"}, r"mask of x is float32 \(4, 5\). Return an integer"),
        ({"image": IMAGE, "mask": MASK.T, "name": "x"}, r"mask of x is int64 \(5, 4\). Return an integer .*\(4, 5\)"),
        ({"image": IMAGE, "mask": MASK * 2, "name": "x"}, "mask of x holds 2, 510. Return ids from 0 to 1, or 255"),
    ],
)
def test_items_that_do_not_fit_are_named(item, said):
    with pytest.raises(UserError, match=said):
        CustomDataset(type("Part", (Whole,), {"__getitem__": lambda self, index: item})())[0]


def test_custom_dataset_must_agree_with_the_config():
    items = {"__getitem__": lambda self, index: {"image": IMAGE, "mask": MASK, "name": self.names[index]}}
    whole = type("Part", (Whole,), items)()
    data = check_custom_dataset(whole, ["a", "b"], 255)
    assert data[1]["mask"].dtype == torch.uint8 and torch.equal(data[1]["mask"].long(), MASK)
    assert prepare_dataset(data, split="train", labelled=0.5).names in (["x"], ["y"])
    for classes, ignored in ((["a", "c"], 255), (["a", "b"], 254)):
        with pytest.raises(UserError, match=r"but the data set of data.reader has"):
            check_custom_dataset(whole, classes, ignored)
    for options in ({"on_error": "skip"}, {"cache": "packed"}):
        with pytest.raises(UserError, match=rf"^{[*options][0]}=.* needs a reader that returns a .*PairDataset"):
            prepare_dataset(data, split="train", **options)
