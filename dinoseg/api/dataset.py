"""`dinoseg.open_dataset`: images and masks of a config's dataset for a torch DataLoader."""

import re
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

from torch.utils.data import Dataset

from dinoseg.api.compose import read_call
from dinoseg.config.composition import compose
from dinoseg.config.plain import flatten
from dinoseg.core.sample_maps import get_map_kinds
from dinoseg.core.shapes import SegmentationData
from dinoseg.experiment.builder import Builder
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import check_annotations

TRAINING_KEYS = ("augment", "batch_size", "labelled", "views", "workers")  # keys of `data` that only a training reads


class SegmentationDataset(Dataset):
    """Map-style dataset of images and masks, which `dinoseg.open_dataset` returns.

    Items are dicts of `image` (C, H, W), uint8 RGB or other channels as uint8 or uint16; `mask` (H, W) uint8 with class
    ids or `ignore_index`, or its layers (K, H, W); and `name`; also of `maps` by name, if the dataset declares some. It
    can be pickled, and so read by worker processes of a DataLoader.

    Args:
        data: the dataset as its reader returns it.
        transform: function of an item, whose result is the item instead; None: none.

    Attributes:
        classes: the class names in the order of their ids.
        palette: (red, green, blue) of each class, 0..255.
        ignore_index: mask value of pixels without a label.
        num_classes: number of classes.
        names: the names of the items in order.
        maps: the kinds of the maps that items have besides their mask, by name.

    Examples:
        >>> import dinoseg, torch
        >>> class One:
        ...     classes, palette, ignore_index, names = ("a",), ((0, 0, 0),), 255, ("x",)
        ...     def __len__(self): return 1
        ...     def __getitem__(self, index):
        ...         return {"image": torch.zeros(3, 2, 2), "mask": torch.zeros(2, 2), "name": "x"}
        >>> dinoseg.SegmentationDataset(One(), transform=lambda item: item["image"].shape)[0]
        torch.Size([3, 2, 2])
    """

    def __init__(self, data: SegmentationData, transform: Callable[[Any], Any] | None = None) -> None:
        self.data, self.transform = data, transform
        self.classes = tuple(data.classes)
        self.palette = tuple(data.palette)
        self.ignore_index = data.ignore_index
        self.num_classes = len(self.classes)
        self.names = tuple(data.names)
        self.maps = dict(get_map_kinds(data))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} items")
        item = dict(self.data[index % len(self)])
        return item if self.transform is None else self.transform(item)

    def __repr__(self) -> str:
        return f"dinoseg.SegmentationDataset({len(self)} items, {self.num_classes} classes)"


@check_annotations
def open_dataset(
    name: str = "folder",
    *,
    root: str | PathLike[str] | None = None,
    split: str = "train",
    classes: Sequence[str] | None = None,
    transform: Callable[[Any], Any] | None = None,
    config_dir: str | PathLike[str] | None = None,
    **overrides: Any,
) -> SegmentationDataset:
    """Open one split of a dataset of images and masks.

    Files are found and paired now, and read when an item is taken. docs/own_data.md describes the layouts. Images and
    masks have their own sizes: crop or resize them in `transform` before they are stacked.

    Args:
        name: option of the group, see `list_datasets`; `folder` reads your own images and masks.
        root: folder of the dataset; needed unless the option sets it.
        split: train, val or test.
        classes: class names in the order of their ids; None: those of the option, or of `classes.yaml` in `root`.
        transform: function of an item, such as an augmentation; its result is the item instead.
        config_dir: folder with config groups of your own, as `--config-dir` on the command line.
        overrides: further keys of the dataset's config, such as `palette=[[0, 0, 0], [0, 255, 0]]` or
            `reader={"layout": {"images": "{split}/photos"}}`, or an option with its keys, such as
            `pixels={"name": "files", "value_range": [0, 4095]}`. Full names and `data={...}` are accepted, too; and
            `task="multilabel"`, for masks (K, H, W).

    Raises:
        UserError: an unknown option, key or split, a key that only a training reads, no classes, a missing folder, or
            an image without a mask; when an item is read: an unreadable file, or a mask value that is not a class.

    Examples:
        >>> import dinoseg, numpy, pathlib, PIL.Image, tempfile
        >>> root = pathlib.Path(tempfile.mkdtemp())
        >>> for kind in ("images", "masks"):
        ...     (root / "train" / kind).mkdir(parents=True)
        >>> PIL.Image.fromarray(numpy.zeros((32, 48, 3), numpy.uint8)).save(root / "train/images/a.png")
        >>> PIL.Image.fromarray(numpy.ones((32, 48), numpy.uint8)).save(root / "train/masks/a.png")
        >>> data = dinoseg.open_dataset(root=root, classes=["ground", "leaf"])
        >>> data[0]["image"].shape, data[0]["mask"].unique(), data[0]["name"]
        (torch.Size([3, 32, 48]), tensor([1], dtype=torch.uint8), 'a')
    """
    given: Mapping[str, Any] = {"root": root, "classes": None if classes is None else list(classes)}
    keys = {key: value for key, value in given.items() if value is not None} | overrides
    table = keys.pop("data", {})
    keys |= table if isinstance(table, Mapping) else {"name": table}
    name = keys.pop("name", name)
    call = read_call((), {"data": name, **{_whole_key(key): value for key, value in keys.items()}}, config_dir)
    names = [*call.options, *(key for value in call.values for key, _ in flatten({value.key: value.value}))]
    for key in TRAINING_KEYS:
        if any(f"{each.replace('/', '.')}.".startswith(f"data.{key}.") for each in names):
            raise UserError(
                f"{key} has no effect on a dataset of your own loop. Leave it out, or train by dinoseg.train."
            )
    cfg = compose(call.options, call.values, call.folders[1:]).cfg
    return SegmentationDataset(Builder(cfg).dataset(split), transform)


def _whole_key(key: str) -> str:
    """Return the full key of an argument of `open_dataset`: `palette` is `data.palette`."""
    return key if re.match(r"\+*(data|task)\b", key) else f"data.{key}"
