"""Objects where option names are accepted: modules of `create_model`, datasets and losses of modes."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from dinoseg.api.dataset import SegmentationDataset
from dinoseg.config.nodes import expect_type
from dinoseg.config.plain import keys_of
from dinoseg.core.contracts import Backbone, Head, Loss
from dinoseg.core.geometry import widths
from dinoseg.core.splits import SPLITS
from dinoseg.data.custom import CustomDataset
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.experiment.objects import OPTION
from dinoseg.models.model import SegmentationModel
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import join_names

CONTRACTS: Mapping[str, type[nn.Module]] = {"backbone": Backbone, "head": Head, "loss": Loss}


def split_modules(overrides: Mapping[str, Any], *groups: str) -> tuple[dict[str, Any], dict[str, nn.Module]]:
    """Return overrides in which an object of a group is the option `_object`, and these objects by group.

    Raises:
        UserError: an object is not of the group's base class, or a key has no effect on it.
    """
    options, objects = dict(overrides), {}
    for group in groups:
        value = overrides.get(group)
        if isinstance(value, nn.Module) or callable(value):
            objects[group] = expect_type(CONTRACTS[group], value, group)
            options[group] = OPTION
    unread = {"backbone.weights", "head.layers"}.intersection(keys_of(overrides))
    if "backbone" in objects and unread:
        key = min(unread).replace("backbone.weights", "weights")
        raise UserError(f"{key} has no effect on a backbone that is an object, which has its own. Leave it out.")
    return options, objects


def refuse_modules(overrides: Mapping[str, Any], *groups: str) -> None:
    """Refuse objects of groups that a checkpoint has to name.

    Raises:
        UserError: there is one.
    """
    for group in groups:
        if isinstance(overrides.get(group), nn.Module | type):
            raise UserError(
                f"{group} is an object, which the checkpoints of a run could not name. Make it an option "
                f"(docs/extending.md#{group}); or give it to dinoseg.create_model, and train in a loop of your own."
            )


def is_dataset(value: Any) -> bool:
    """Return whether a value is a dataset object, and no option, path or keys."""
    return hasattr(value, "__getitem__") and not isinstance(value, str | Mapping | Sequence)


def split_datasets(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return overrides in which datasets are the option `data=_object`, and these datasets by split.

    Raises:
        UserError: one dataset is given instead of one for each split, or a dataset is wrong.
    """
    given = overrides.get("data")
    if is_dataset(given):
        raise UserError(
            'data is one dataset, without a split. Give data={"train": DATASET, "val": DATASET}; '
            "torch.utils.data.random_split divides one."
        )
    if not isinstance(given, Mapping) or given.keys().isdisjoint(SPLITS):
        return dict(overrides), {}
    if others := [key for key, value in given.items() if key not in SPLITS or isinstance(value, str | PathLike)]:
        raise UserError(
            f"data: {others[0]} is not a dataset of a split. Give dataset objects only, for {join_names(SPLITS)}; or, "
            'for a folder with all splits, data={"root": FOLDER}.'
        )
    datasets = {split: _check_dataset(each, split) for split, each in given.items()}
    first, *others = datasets
    keys = _keys_of(datasets[first])
    for split in others:
        for key in ("classes", "ignore_index"):
            found = _keys_of(datasets[split])[key]
            if found != keys[key]:
                raise UserError(f"data: {key} of {first} is {keys[key]!r}, and of {split} {found!r}. Give the same.")
    options = {"data": OPTION, **{f"data.{key}": value for key, value in keys.items()}}
    return {**overrides, **options}, {f"data.{split}": each for split, each in datasets.items()}


def _keys_of(dataset: Any) -> dict[str, Any]:
    """Return the keys of the group `data` that a dataset determines."""
    return {
        "classes": list(dataset.classes),
        "ignore_index": dataset.ignore_index,
        "palette": [list(colour) for colour in dataset.palette],
    }


def _check_dataset(given: Any, split: str) -> Any:
    """Return a dataset with all members that a training reads."""
    if isinstance(given, Subset):
        whole = _check_dataset(given.dataset, split)
        return whole.keep({whole.names[row] for row in given.indices})
    if isinstance(given, SegmentationDataset) and given.transform is None:
        given = given.data
    return given if isinstance(given, PairDataset | CustomDataset) else CustomDataset(given, where=f"data, {split}")


def check_fit(model: SegmentationModel, num_classes: int) -> None:
    """Refuse objects that do not fit, by one pass of a small image through the model.

    Raises:
        UserError: maps or scores have another shape than promised.
    """
    backbone = model.backbone
    names = {"backbone": type(backbone).__name__, "head": type(model.head).__name__}
    side = 2 * backbone.patch_size
    images = torch.zeros(1, backbone.channels, side, side)
    model.eval()
    with torch.no_grad():
        found = [list(each.shape) for each in backbone(images)]
        promised = [[1, width, 2, 2] for width in widths(backbone.dim, backbone.num_layers)]
        if backbone.is_pyramid:  # only the coarsest map has a grid of patches
            promised = [[*sizes[:2], *given[2:]] for sizes, given in zip(promised, found, strict=False)]
        if found != promised:
            raise UserError(
                f"backbone: {names['backbone']} returns maps {found} for an image of {side} x {side}, but its dim, "
                f"num_layers and patch_size promise {promised}. Correct them, or `forward`."
            )
        scores = list(model(images).scores().shape)
    if scores != [1, num_classes, side, side]:
        raise UserError(
            f"head: {names['head']} returns scores {scores} for an image of {side} x {side}, and the model has "
            f"{num_classes} classes. Return {[1, num_classes, side, side]}."
        )
