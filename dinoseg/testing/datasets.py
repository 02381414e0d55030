"""Conformance of datasets."""

import pickle
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from dinoseg.core.shapes import Sample, SegmentationData
from dinoseg.data.custom import CustomDataset
from dinoseg.data.loader import eval_samples
from dinoseg.testing.modules import require
from dinoseg.utils.errors import UserError
from dinoseg.utils.files import is_name
from dinoseg.utils.wording import join_names


def check_dataset(dataset: Any, *, samples: int = 8, has_layers: bool = False) -> None:
    """Check that a dataset of images and masks keeps the contract of `dinoseg.core.shapes.SegmentationData`.

    Args:
        dataset: one split.
        samples: number of samples to read, from the first one.
        has_layers: whether masks have a layer for each class, as for task=multilabel.

    Raises:
        AssertionError: it breaks a rule; the message names the rule, the result and the remedy.

    Examples:
        >>> import dinoseg
        >>> from dinoseg.testing import check_dataset
        >>> check_dataset(dinoseg.open_dataset("sarrarp", root="outputs/demo/data"), samples=2)
    """
    try:
        checked = CustomDataset(dataset, has_layers=has_layers)
        count = min(samples, len(checked))
        expected = [checked[index] for index in range(count)]
    except UserError as error:
        raise AssertionError(str(error)) from error
    check_names(dataset)
    check_access(dataset, expected)
    check_pickle(dataset, expected)
    check_loading(checked, type(dataset).__name__, expected)


def check_names(dataset: Any) -> None:
    """Check that results can be written under the names of the samples."""
    odd = [name for name in dataset.names if not all(map(is_name, name.split("/")))]
    require(
        not odd,
        f"{type(dataset).__name__}: names must be relative paths, under which results are written, but `names` holds "
        f"{join_names(odd)}; leave out empty parts, `.`, `..` and a leading slash.",
    )


def check_access(dataset: Any, expected: Sequence[Sample]) -> None:
    """Check that a sample is the same whenever it is read: augmentation and caches rely on it."""
    again = [dataset[index] for index in reversed(range(len(expected)))]
    _require_equal(
        list(reversed(again)),
        expected,
        f"{type(dataset).__name__}: an index must give the same sample at each access and in any order, but",
        "read by the index alone, and leave augmentation to data.augment",
    )


def check_pickle(dataset: Any, expected: Sequence[Sample]) -> None:
    """Check that a process which is started afresh, as on Windows, can receive the dataset."""
    name = type(dataset).__name__
    try:
        copied = pickle.loads(pickle.dumps(dataset))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise AssertionError(
            f"{name}: a dataset must be picklable, since loading processes receive it, but it is not ({error}); open "
            "files in `__getitem__`, and define the class at the top of a module."
        ) from error
    _require_equal(
        [copied[index] for index in range(len(expected))],
        expected,
        f"{name}: an unpickled copy must give the same samples, but",
        "keep what they depend on in attributes of the dataset",
    )


def check_loading(dataset: SegmentationData, name: str, expected: Sequence[Sample]) -> None:
    """Check the samples that a loading process reads."""
    loaded = list(islice(eval_samples(dataset, workers=1), len(expected)))
    _require_equal(
        loaded,
        expected,
        f"{name}: a loading process must read the same samples, but",
        "use no state that only one process has",
    )


def _require_equal(found: Sequence[Sample], expected: Sequence[Sample], rule: str, remedy: str) -> None:
    """Compare samples; masks of a custom class may have other integer types than those of the loader."""
    for ours, theirs in zip(found, expected, strict=True):
        same = torch.equal(ours["image"], theirs["image"]) and torch.equal(ours["mask"].long(), theirs["mask"].long())
        maps = theirs.get("maps", {})
        same = same and all(torch.equal(ours["maps"][name], values) for name, values in maps.items())
        require(same and ours["name"] == theirs["name"], f"{rule} {theirs['name']} differs; {remedy}.")
