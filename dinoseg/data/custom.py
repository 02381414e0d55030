"""Datasets of classes outside the package: their required members, and defaults for all others."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dinoseg.core.channels import PixelFormat
from dinoseg.core.sample_maps import check_map_kinds, check_maps, get_map_kinds
from dinoseg.core.shapes import Palette, Sample, SegmentationData
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.report.palette import layer_colours
from dinoseg.utils.errors import UserError
from dinoseg.utils.mask_files import check_layer_names
from dinoseg.utils.wording import count_of, join_names

REQUIRED = {  # members of a dataset class, and their meaning
    "__len__": "the number of samples",
    "__getitem__": "the sample of an index: a dict of image, mask and name",
    "names": "the sample names in order, each unique, relative paths without suffix",
    "classes": "the class names in id order",
    "palette": "an RGB color for each class",
    "ignore_index": "the mask id that is ignored, 0 to 255",
}


class CustomDataset:
    """Checked adapter around an object with the members `REQUIRED`; the rest of `SegmentationData` has defaults.

    Args:
        samples: the dataset. Its items have `image` (C, H, W) uint8 or uint16, `mask` (H, W) of any integer type with
            class ids or the ignored id, and `name`, as in `names`. If the dataset has `maps`, a dict of name to
            `MapKind`, items have these maps, too.
        rows: indices of the samples to use; None: all.
        where: what the caller named the dataset, for errors.
        channels: number of channels C; three are RGB.
        has_layers: whether a mask is (K, H, W), with 0, 1 or the ignored id for each class.

    Raises:
        UserError: a member is missing or wrong; when an item is read: the item is wrong.
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
        self._check_members(samples)
        self.samples = samples
        self.rows = range(len(samples)) if rows is None else rows
        self.classes: list[str] = list(map(str, samples.classes))
        colors = _colors(samples.palette)
        self.palette: Palette = layer_colours(colors) if has_layers else colors
        self.ignore_index = int(samples.ignore_index)
        self.names = [samples.names[row] for row in self.rows]
        self.lacking: Mapping[str, str] = {}
        self.maps = check_map_kinds(get_map_kinds(samples), self._where)
        self.skipped: Mapping[str, str] = {}
        self.split_local_names = False
        self._is_known = torch.zeros(256, dtype=torch.bool)
        self._is_known[[*range(2 if has_layers else len(self.classes)), self.ignore_index]] = True
        self.has_layers = has_layers

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        item, name = self.samples[self.rows[index]], self.names[index]
        if not isinstance(item, Mapping) or (missing := {"image", "mask", "name"} - item.keys()):
            what = f"lacks {', '.join(sorted(missing))}" if isinstance(item, Mapping) else f"is {type(item).__name__}"
            raise UserError(f"{self._where}: the sample {name} {what}. Return a dict of image, mask and name.")
        if item["name"] != name:
            raise UserError(
                f"{self._where}: the sample {name} has the name {item['name']}. Return its name in `names`."
            )
        sample = Sample(
            image=self._image(item["image"], name), mask=self._mask(item["mask"], item["image"], name), name=name
        )
        if self.maps or "maps" in item:
            size = (item["image"].shape[1], item["image"].shape[2])
            sample["maps"] = check_maps(item.get("maps"), self.maps, size, f"{self._where}: the sample {name}")
        return sample

    def keep(self, names: Collection[str]) -> "CustomDataset":
        """Return the dataset restricted to these names, in the same order."""
        rows = [row for row, name in zip(self.rows, self.names, strict=True) if name in names]
        return CustomDataset(self.samples, rows, self.where, channels=self.channels, has_layers=self.has_layers)

    def _check_members(self, samples: Any) -> None:
        missing = [f"`{name}` ({what})" for name, what in REQUIRED.items() if not hasattr(samples, name)]
        if missing:
            raise UserError(
                f"{self._where} lacks {join_names(missing, len(missing))}. Add {'it' if len(missing) == 1 else 'them'}."
            )
        names, classes, ignored = list(samples.names), list(samples.classes), samples.ignore_index
        if (
            len(names) != len(samples)
            or len(set(names)) != len(names)
            or not all(isinstance(name, str) for name in names)
        ):
            raise UserError(
                f"{self._where} has {count_of(len(samples), 'sample')} and {count_of(len(set(names)), 'name')} in "
                "`names`. Give each sample a unique name."
            )
        if not names:
            raise UserError(f"{self._where} has no sample in this split. Check its folder.")
        if len(_colors(samples.palette)) != len(classes):
            raise UserError(
                f"{self._where}: `palette` needs an RGB color for each of {count_of(classes, 'class', 'classes')}."
            )
        if type(ignored) is not int or not 0 <= ignored <= 255:
            raise UserError(f"{self._where}: `ignore_index` is {ignored!r}. Give an integer from 0 to 255.")

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
        data: a `PairDataset`, a `CustomDataset`, or an object of any class with the members `REQUIRED`.
        classes: class names of the config, which set the number of classes of a model.
        ignore_index: ignored id of the config.
        pixels: format of the images of the config.
        has_layers: whether masks have a layer (H, W) of 0, 1 and `ignore_index` for each class.

    Raises:
        UserError: a member is missing, or differs from the config, or its masks have no layers, or the name of a class
            with a layer cannot be that of a file, as predictions need.
    """
    if has_layers:
        _check_layers(data, list(map(str, classes)), ignore_index)
    if isinstance(data, PairDataset):
        return data if pixels.is_rgb else data.read_as(pixels)
    given = (data.samples, data.rows, data.where) if isinstance(data, CustomDataset) else (data,)
    dataset = CustomDataset(*given, channels=pixels.channels, has_layers=has_layers)
    _compare_with_config(dataset, list(map(str, classes)), ignore_index)
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


def _compare_with_config(dataset: CustomDataset, classes: Sequence[str], ignore_index: int) -> None:
    for key, value, configured in (
        ("classes", dataset.classes, classes),
        ("ignore_index", dataset.ignore_index, ignore_index),
    ):
        if value != configured:
            raise UserError(
                f"data.{key}={configured}, but the data set of data.reader has {value}. Pass it on in the YAML file: "
                f"{key}: ${{..{key}}} in `reader`, or correct data.{key}."
            )


def _colors(palette: Any) -> list[tuple[int, int, int]]:
    """Return the colours of a palette, or an empty list if it is malformed."""
    try:
        return [(int(red), int(green), int(blue)) for red, green, blue in palette]
    except (TypeError, ValueError):
        return []


def _form(value: Any) -> str:
    return (
        f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else type(value).__name__
    )
