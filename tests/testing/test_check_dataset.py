"""A dataset that keeps its contract passes, and one broken rule each is refused by the sentence of that rule."""

import os

import pytest
import torch

from dinoseg.testing import check_dataset


class Squares:
    classes = ["ground", "square"]
    palette = [(0, 0, 0), (255, 255, 0)]
    ignore_index = 255
    names = [f"train/{index}" for index in range(4)]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        mask = torch.zeros(12, 20, dtype=torch.int64)
        mask[2 : 5 + index, 3:9] = 1
        mask[0] = self.ignore_index
        image = (200 * (mask == 1)).to(torch.uint8).expand(3, 12, 20).clone()
        return {"image": image, "mask": mask, "name": self.names[index]}


def changed(read=lambda sample: {}, **members):
    """Return a class of datasets with other members, and with what `read` changes in each sample."""
    members["__getitem__"] = lambda self, index: (
        Squares.__getitem__(self, index) | read(Squares.__getitem__(self, index))
    )
    return type("Changed", (Squares,), members)


def add_noise(sample):
    return {"image": sample["image"] + torch.randint(0, 50, (3, 12, 20)).to(torch.uint8)}


class LastRead(Squares):
    """A dataset whose samples depend on the one that was read before."""

    last = 0

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample["mask"][-1, 0] = self.last
        self.last = index % 2
        return sample


class OpenFile(Squares):
    def __init__(self):
        self.file = open(os.devnull, "rb")

    def __del__(self):
        self.file.close()


class ForgottenOffset(Squares):
    offset = 0

    def __init__(self):
        self.offset = 1

    def __getstate__(self):
        return {}

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "image": sample["image"] + self.offset}


class OneProcess(Squares):
    def __init__(self):
        self.process = os.getpid()

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "image": sample["image"] + (os.getpid() != self.process)}


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (changed(palette=[(0, 0, 0)]), "data.palette has 1 colours for 2 classes"),
        (changed(names=["a"] * 4), "each with a unique text as name"),
        (changed(classes=["ground", "ground"]), "names ground more than once: make each name unique"),
        (changed(palette=[(0, 0, 0), (256, 0, 0)]), "three whole numbers from 0 to 255"),
        (changed(lambda sample: {"mask": 2 * sample["mask"]}), "train/0 holds 2, 510. Return ids from 0 to 1, or 255"),
        (
            changed(lambda sample: {"image": sample["image"] / 255}),
            r"is float32 .* Return a tensor \(3, H, W\) of uint8",
        ),
        (
            changed(names=["/a", "b//c", "../d", "e"]),
            "^Changed: names must be .* `names` holds /a, b//c, ../d; leave out",
        ),
        (changed(add_noise), "^Changed: .* same sample at each access .* but train/0 differs; read by the index alone"),
        (LastRead, "^LastRead: .* the same sample at each access and in any order, but train/"),
        (OpenFile, r"^OpenFile: a dataset must be picklable, .* \(cannot pickle .*\); open files in `__getitem__`"),
        (ForgottenOffset, "^ForgottenOffset: an unpickled copy must give the same samples, but train/0 differs"),
        pytest.param(
            OneProcess,
            "^OneProcess: a loading process must read the same samples, but train/0",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_dataset_that_breaks_a_rule_is_refused(dataset, message):
    with pytest.raises(AssertionError, match=message):
        check_dataset(dataset())
