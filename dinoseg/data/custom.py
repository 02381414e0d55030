"""Datasets of classes outside the package: checks of their samples, and defaults for optional members."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dinoseg.core.channels import PixelFormat
from dinoseg.core.sample_maps import check_maps, get_map_kinds
from dinoseg.core.shapes import Palette, Sample, SegmentationData
from dinoseg.data.classes.labels import Labels
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.utils.errors import UserError
from dinoseg.utils.mask_files import check_layer_names
from dinoseg.utils.wording import count_of, format_value, join_names


class CustomDataset:
    """Checked adapter around a dataset with a few members; the rest of `SegmentationData` has defaults.

    Args:
        samples: the dataset, with `__len__`, `__getitem__`, `names` (of the samples in order, unique relative paths
            without suffix), `classes` (names in id order), `palette` (an RGB colour for each class) and `ignore_index`
            (the mask id that is ignored, 0 to 255). Its items are dicts of `image` (C, H, W) uint8 or uint16, `mask`
            (H, W) of any integer type with class ids or the ignored id, and `name`, as in `names`. If the dataset has
            `maps`, a dict of name to `MapKind`, items have these maps, too.
        rows: indices of the samples to use; None: all.
        where: what the caller named the dataset, for errors.
        channels: number of channels C; three are RGB.
        has_layers: whether a mask is (K, H, W), with 0, 1 or the ignored id for each class.

    Raises:
        UserError: a member is wrong; when an item is read: the item is wrong.
    """

    def __init__(
        self,
        samples: Any,
        rows: Sequence[int] | None = None,
        where: str = "data.reader",
        *,
        channels: int = 3,
        has_layers: bool = False,
    ) -> None:
        self.channels = channels
        self.where = where
        self._where = f"{where}: {type(samples).__module__}.{type(samples).__qualname__}"
        names = list(samples.names)
        has_others = not all(isinstance(name, str) for name in names)
        if not names or len(names) != len(samples) or len(set(names)) != len(names) or has_others:
            raise UserError(
                f"{self._where} has {count_of(len(samples), 'sample')} and {count_of(len(set(names)), 'name')} in "
                "`names` of this split. Give it samples, each with a unique text as name."
            )
        labels = Labels.of(
            list(map(str, samples.classes)), samples.palette, samples.ignore_index, has_layers=has_layers
        )
        self.samples = samples
        self.rows = range(len(samples)) if rows is None else rows
        self.classes: list[str] = list(labels.classes)
        self.palette: Palette = list(labels.palette)
        self.ignore_index = labels.ignore_index
        self.names = [names[row] for row in self.rows]
        self.lacking: Mapping[str, str] = {}
        self.maps = dict(get_map_kinds(samples))
        self.skipped: Mapping[str, str] = {}
        self.split_local_names = False
        self._is_known = torch.zeros(256, dtype=torch.bool)
        self._is_known[[*range(2 if has_layers else len(self.classes)), self.ignore_index]] = True
        self.has_layers = has_layers

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        item, name = self.samples[self.rows[index]], self.names[index]
        if not isinstance(item, Mapping) or item.get("name") != name:
            given = (
                f"has the name {format_value(item.get('name'))}"
                if isinstance(item, Mapping)
                else f"is {type(item).__name__}"
            )
            raise UserError(
                f"{self._where}: the sample {format_value(name)} {given}. Return a dict of image, mask and name, as in "
                "`names`."
            )
        sample = Sample(
            image=self._image(item["image"], name), mask=self._mask(item["mask"], item["image"], name), name=name
        )
        if self.maps or "maps" in item:
            size = (item["image"].shape[1], item["image"].shape[2])
            sample["maps"] = check_maps(item.get("maps") or {}, self.maps, size, f"{self._where}: the sample {name}")
        return sample

    def keep(self, names: Collection[str]) -> "CustomDataset":
        """Return the dataset restricted to these names, in the same order."""
        rows = [row for row, name in zip(self.rows, self.names, strict=True) if name in names]
        return CustomDataset(self.samples, rows, self.where, channels=self.channels, has_layers=self.has_layers)

    def _image(self, image: Any, name: str) -> Tensor:
        is_levels = isinstance(image, Tensor) and image.dtype in (torch.uint8, torch.uint16)
        if not is_levels or image.ndim != 3 or len(image) != self.channels:
            raise UserError(
                f"{self._where}: the image of {name} is {_form(image)}. Return a tensor ({self.channels}, H, W) of "
                "uint8, or of uint16; data.channels sets the number of channels."
            )
        return image

    def _mask(self, mask: Any, image: Tensor, name: str) -> Tensor:
        is_integer = isinstance(mask, Tensor) and not (
            mask.is_floating_point() or mask.is_complex() or mask.dtype == torch.bool
        )
        shape = (*[len(self.classes)] * self.has_layers, *image.shape[1:])
        if not is_integer or mask.shape != shape:
            size = f"({', '.join(map(str, shape))})"
            raise UserError(f"{self._where}: the mask of {name} is {_form(mask)}. Return an integer tensor {size}.")
        ids = mask.long()
        unknown = (ids < 0) | (ids > 255) | ~self._is_known[ids.clamp(0, 255)]
        if unknown.any():
            last = 1 if self.has_layers else len(self.classes) - 1
            foreign = join_names([str(value) for value in ids[unknown].unique().tolist()])
            raise UserError(
                f"{self._where}: the mask of {name} holds {foreign}. Return ids from 0 to {last}, or "
                f"{self.ignore_index} to ignore a pixel."
            )
        return ids.to(torch.uint8)


def check_custom_dataset(
    data: Any,
    classes: Sequence[str],
    ignore_index: int,
    *,
    pixels: PixelFormat = PixelFormat(),  # noqa: B008 (frozen)
    has_layers: bool = False,
) -> SegmentationData:
    """Return a reader's result as a dataset that has all members of `SegmentationData`.

    Args:
        data: a `PairDataset`, a `CustomDataset`, or an object of any class, see `CustomDataset`.
        classes: class names of the config, which set the number of classes of a model.
        ignore_index: ignored id of the config.
        pixels: format of the images of the config.
        has_layers: whether masks have a layer (H, W) of 0, 1 and `ignore_index` for each class.

    Raises:
        UserError: a member is wrong, or differs from the config, or its masks have no layers, or the name of a class
            with a layer cannot be that of a file, as predictions need.
    """
    if has_layers:
        _check_layers(data, list(map(str, classes)), ignore_index)
    if isinstance(data, PairDataset):
        return data if pixels.is_rgb else data.read_as(pixels)
    given = (data.samples, data.rows, data.where) if isinstance(data, CustomDataset) else (data,)
    dataset = CustomDataset(*given, channels=pixels.channels, has_layers=has_layers)
    names = list(map(str, classes))
    if (dataset.classes, dataset.ignore_index) != (names, ignore_index):
        raise UserError(
            f"data.classes={names} and data.ignore_index={ignore_index}, but the data set of data.reader has "
            f"{dataset.classes} and {dataset.ignore_index}. Pass them on in the YAML file: classes: ${{..classes}} and "
            "ignore_index: ${..ignore_index} in `reader`, or correct the keys."
        )
    return dataset


def _check_layers(data: Any, classes: Sequence[str], ignore_index: int) -> None:
    check_layer_names(classes)
    if ignore_index < max(2, len(classes)):
        raise UserError(
            f"data.ignore_index={ignore_index}: layers hold 0 and 1, and classes have the ids 0 to {len(classes) - 1}. "
            "Give another value, such as 255."
        )
    if isinstance(data, PairDataset) and not data.has_layers:
        raise UserError(
            "task=multilabel needs masks with a layer for each class, and this dataset has one class per pixel. "
            "Choose data=folder, data=coco or data=labelme."
        )


def _form(value: Any) -> str:
    return (
        f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else type(value).__name__
    )
