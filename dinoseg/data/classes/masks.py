"""Conversion of mask files to class ids: from ids, colours, or 0 / 255; a value without class is an error.

The module imports no torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from dinoseg.core.sources import MaskSource, mask_file
from dinoseg.data.classes.labels import Labels, as_color
from dinoseg.data.classes.mask_advice import HIGHEST_ID, for_binary, for_colors, for_ids
from dinoseg.utils.errors import UserError
from dinoseg.utils.images import has_one_bit, read_ids, read_image
from dinoseg.utils.wording import join_names

MaskFormat = Literal["ids", "palette", "binary"]
LAYER_VALUES = ("absent", "present")  # meanings of 0 and 1 in a mask of one class
_PROPORTIONS = 0.05  # largest relative difference in aspect ratio for which a mask is resized


@dataclass(frozen=True)
class Masks:
    """Encoding of mask files.

    Args:
        format: `ids`: the stored numbers (of a palette file, its indices) are class ids; `palette`: colours stand for
            classes by `data.palette`; `binary`: 0 is class 0 and 255 is class 1, or black and white in a file of one
            bit per pixel.
        ids: file id to class id, ignore_index or -1 (rejected), for `ids`. Ids not listed here are unchanged, unless
            the table renumbers classes, as {1: 0, 2: 1} does: then they have no class.
        others: for `ids`: the class of every other number: not listed in `ids`, not a class id and not ignored.
        reduce_zero_label: for `ids`: file id 0 is ignored, and k is class k - 1, as in ADE20K.
        colors: class id to further colours that stand for it, for `palette`.
        ignore_colors: colours that are ignored, for `palette`.
        on_size_mismatch: `error`, or `resize_mask`: resize a mask of its image's aspect ratio, nearest neighbour.
        described: contents of `classes.yaml`, whose `ids` must equal `ids` here; None: the file is not used.
    """

    format: MaskFormat = "ids"
    ids: Mapping[int, int] | None = None
    others: str | None = None
    reduce_zero_label: bool = False
    colors: Mapping[int, Sequence[Sequence[int]]] | None = None
    ignore_colors: Sequence[Sequence[int]] = ()
    on_size_mismatch: Literal["error", "resize_mask"] = "error"
    described: Mapping[str, Any] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Reject unknown options, and those without effect."""
        for name, table in (("ids", self.ids), ("colors", self.colors)):
            if table:
                object.__setattr__(self, name, _convert_keys(table))
        if self.described is not None and (self.ids or None) != (_convert_keys(self.described.get("ids")) or None):
            raise UserError(
                f"data.reader.masks.ids={self.ids} would replace all ids of classes.yaml in data.root. Write them "
                "there: at their class, or as `ignore: {ids: [...]}`. Or set data.classes too: then classes.yaml is "
                "not read."
            )
        for name, setting, needed in (
            ("ids", self.ids, "ids"),
            ("others", self.others, "ids"),
            ("reduce_zero_label", self.reduce_zero_label, "ids"),
            ("colors", self.colors, "palette"),
            ("ignore_colors", self.ignore_colors, "palette"),
        ):
            if setting and self.format != needed:
                raise UserError(
                    f"data.reader.masks.{name} has no effect with format={self.format}: remove it, or set "
                    f"format={needed}."
                )


def _convert_keys(table: Mapping[Any, Any] | None) -> dict[Any, Any]:
    """Return a table with integer keys: a checkpoint's description is JSON, whose keys are strings."""
    return {int(key) if str(key).isdecimal() else key: value for key, value in (table or {}).items()}


class MaskReader:
    """Reader of mask files as class ids (H, W) uint8.

    Args:
        labels: the classes that a mask may hold.
        masks: how the files are encoded.
        has_layers: whether each file holds a single class: 0, 1 and ignore_index, or 0 and 255 (`binary`).

    Raises:
        UserError: labels and masks are inconsistent.
    """

    def __init__(self, labels: Labels, masks: Masks, *, has_layers: bool = False) -> None:
        self.labels = labels
        self.masks = masks
        self.has_layers = has_layers
        values = Labels.of(LAYER_VALUES, None, labels.ignore_index) if has_layers else labels
        if has_layers and (masks.format == "palette" or masks.reduce_zero_label):
            raise UserError(
                "data.reader.masks.format=palette and reduce_zero_label are for masks of all classes. Leave them out "
                "where each class has masks of its own (task=multilabel)."
            )
        if masks.format == "ids":
            rest = -1 if masks.others is None else _find_class(masks.others, values, has_layers)
            self._table = _make_id_table(values, masks.ids or {}, first=int(masks.reduce_zero_label), rest=rest)
        elif masks.format == "palette":
            self._codes, self._values = _make_color_table(labels, masks.colors or {}, masks.ignore_colors)
        elif len(values.classes) != 2:
            raise UserError(
                f"data.reader.masks.format=binary needs 2 classes, data.classes has {len(labels.classes)}. Name the "
                "classes of 0 and 255; if each class has masks of its own, set task=multilabel."
            )

    def read(self, path: MaskSource) -> np.ndarray:
        """Return class ids 0..K-1 and ignore_index as (H, W) uint8, which a drawing already holds; or layers (K, H, W).

        Raises:
            UserError: the file is unreadable, or holds a number or colour that has no class.
        """
        if not isinstance(path, Path) and path.has_class_ids:
            return path.read()
        if self.masks.format == "palette" and isinstance(path, Path):
            return self._from_colors(read_image(path), path)
        numbers = take_one_channel(read_ids(path) if isinstance(path, Path) else path.read(), path)
        if self.masks.format == "binary":
            return _from_binary(numbers, path, described=self.masks.described is not None)
        return self._from_ids(numbers, path)

    def rules(self) -> str:
        """Return a canonical JSON text of everything besides the file that class ids depend on."""
        labels, masks = self.labels, self.masks
        options = {option.name: getattr(masks, option.name) or None for option in fields(masks) if option.compare}
        return json.dumps([labels.classes, labels.ignore_index, labels.palette, options], sort_keys=True)

    def _from_ids(self, numbers: np.ndarray, path: MaskSource) -> np.ndarray:
        ids: np.ndarray | None = None  # (H, W) int16
        if numbers.dtype == np.uint8:
            ids = cv2.LUT(numbers, self._table[:256])  # less than half the time of indexing
        elif numbers.min() >= 0 and numbers.max() <= HIGHEST_ID:
            ids = self._table[numbers]
        if ids is None or ids.min() < 0:
            raise self._foreign_ids_error(numbers, path)
        return ids.astype(np.uint8)

    def _foreign_ids_error(self, numbers: np.ndarray, path: MaskSource) -> UserError:
        """Return the error for a mask with ids that no class has."""
        last = 1 if self.has_layers else len(self.labels.classes) - 1
        ignore = self.labels.ignore_index
        foreign = [v for v in np.unique(numbers) if not 0 <= v <= HIGHEST_ID or self._table[v] < 0]
        known = np.flatnonzero((self._table >= 0) & (self._table != ignore))
        stand = "" if known.size == last + 1 == known[-1] + 1 else f", stored in files as {_join_some(known)}"
        described = self.masks.described is not None
        if self.has_layers:
            return UserError(
                f"{path} holds the ids {_join_some(foreign)}. A mask of one class has the id 0 where it is absent, 1 "
                f"where it is present, and {ignore} is ignored{stand}. {for_ids(foreign, ignore, described=described)}"
            )
        return UserError(
            f"{path} holds the ids {_join_some(foreign)}, which are not classes: data.classes has ids 0 to "
            f"{last}{stand}, and {ignore} is ignored. "
            f"{for_ids(foreign, ignore, described=described, next_id=None if stand else last + 1)}"
        )

    def _from_colors(self, pixels: np.ndarray, path: Path) -> np.ndarray:
        codes = _encode_colors(pixels.astype(np.int32))  # (H, W)
        nearest = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        unknown = self._codes[nearest] != codes
        if unknown.any():
            foreign, counts = np.unique(codes[unknown], return_counts=True)
            colors = [(int(c) >> 16, int(c) >> 8 & 255, int(c) & 255) for c in foreign[np.argsort(-counts)]]
            described = self.masks.described is not None
            raise UserError(
                f"{path} holds colours that are not in {'classes.yaml' if described else 'data.palette'}: "
                f"{_join_some(colors)}, on {int(unknown.sum())} pixels. {for_colors(colors, described=described)}"
            )
        return self._values[nearest]


def fit_mask(mask: np.ndarray, size: tuple[int, int], rule: str, *, image: object, path: object) -> np.ndarray:
    """Return class ids (H, W) or layers (K, H, W) at `size`, the (H, W) of their image.

    Args:
        mask: class ids of any size.
        size: (H, W) of the image.
        rule: `error`, or `resize_mask`: nearest neighbour, if the aspect ratios are similar.
        image: name of the image in a message.
        path: name or path of the mask in a message.

    Raises:
        UserError: the sizes differ, and the rule does not allow resizing.
    """
    if mask.shape[-2:] == size:
        return mask
    check_fit((mask.shape[-2], mask.shape[-1]), size, rule, image=image, path=path)
    if mask.ndim > 2:
        return np.stack([fit_mask(layer, size, rule, image=image, path=path) for layer in mask])
    # pixel centres aligned: plain INTER_NEAREST would shift the mask by up to half a pixel
    return cv2.resize(mask, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)


def check_fit(found: tuple[int, int], size: tuple[int, int], rule: str, *, image: object, path: object) -> None:
    """Refuse a mask of a size `found` (H, W) that `fit_mask` refuses, whose other arguments are the same."""
    if found == size:
        return
    height, width = size[0] / found[0], size[1] / found[1]
    if rule == "error" or abs(height / width - 1) > _PROPORTIONS:
        raise UserError(
            f"{image} is {size[1]} x {size[0]} (width x height), its mask {path} is {found[1]} x {found[0]}. Make them "
            "equal: images are turned by their EXIF orientation, masks are not. "
            f"data.reader.masks.on_size_mismatch=resize_mask resizes masks whose aspect ratio differs by up to "
            f"{_PROPORTIONS:.0%}."
        )


def _from_binary(numbers: np.ndarray, path: MaskSource, *, described: bool) -> np.ndarray:
    ids = (numbers == 255).astype(np.uint8)
    other = numbers[(numbers != 0) & (ids == 0)]
    if other.size and numbers.max() == 1 and has_one_bit(mask_file(path)):
        return numbers.astype(np.uint8)
    if other.size:
        advice = for_binary(np.unique(numbers).tolist(), described=described)
        raise UserError(
            f"{path} is not a binary mask: besides 0 and 255 it holds {_join_some(np.unique(other))}. {advice}"
        )
    return ids


def take_one_channel(numbers: np.ndarray, path: MaskSource) -> np.ndarray:
    """Return the numbers (H, W) of a mask file that has one channel, or three equal ones.

    Raises:
        UserError: its channels differ.
    """
    if numbers.ndim == 2:
        return numbers
    first = numbers[..., 0]
    if not (np.array_equal(first, numbers[..., 1]) and np.array_equal(first, numbers[..., 2])):
        raise UserError(
            f"{path} is a colour image, not a mask of class ids. If its colours stand for classes, set "
            "data.reader.masks.format=palette and give data.palette."
        )
    return first


def _find_class(name: str, labels: Labels, has_layers: bool) -> int:
    if name not in labels.classes:
        named = "the meanings of a mask of one class" if has_layers else "data.classes"
        raise UserError(
            f"data.reader.masks.others={name} is not a class. Name one of {named}: {', '.join(labels.classes)}."
        )
    return labels.classes.index(name)


def _make_id_table(labels: Labels, ids: Mapping[int, int], first: int, rest: int) -> np.ndarray:
    """Return a table (65536,) int16 from file id to class id or ignore_index, or -1 for a rejected id.

    The first class has the file id `first`; lower ids are ignored, and ids without class map to `rest`.
    """
    count, ignore = len(labels.classes), labels.ignore_index
    for source, target in ids.items():
        is_id = type(source) is int and 0 <= source <= HIGHEST_ID  # NumPy would take True for a whole table
        if not is_id or target not in (*range(-1, count), ignore):
            raise UserError(
                f"data.reader.masks.ids maps {source!r} to {target!r}: map numbers from 0 to {HIGHEST_ID} to a class "
                f"id from 0 to {count - 1}, {ignore} to ignore them, or -1 to refuse them."
            )
    table = np.full(HIGHEST_ID + 1, rest, dtype=np.int16)
    table[:first] = ignore
    table[first : first + count] = np.arange(count)
    moved = {source - first: target for source, target in ids.items() if 0 <= target < count}
    moved = {class_id: target for class_id, target in moved.items() if class_id != target}
    if moved.keys() & set(moved.values()):  # renumbering: {1: 0, 2: 1} drops file id 0; {2: 1} alone merges
        table[first : first + count] = rest
    for source, target in ids.items():
        table[source] = target
    table[ignore] = ids.get(ignore, ignore)
    return table


def _make_color_table(
    labels: Labels, further: Mapping[int, Sequence[Sequence[int]]], ignored: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted colour codes and the class id or ignore_index of each."""
    if unknown := [key for key in further if key not in range(len(labels.classes))]:
        raise UserError(
            f"data.reader.masks.colors has colours for {unknown[0]!r}: give class ids from 0 to "
            f"{len(labels.classes) - 1}, such as {{0: [[255, 255, 255]]}}."
        )
    merged = [(as_color(color), key) for key, class_colors in further.items() for color in class_colors]
    colors = [*labels.palette, *(color for color, _ in merged), *map(as_color, ignored)]
    values = [*range(len(labels.palette)), *(key for _, key in merged), *[labels.ignore_index] * len(ignored)]
    codes = _encode_colors(np.array(colors, dtype=np.int32))
    order = np.argsort(codes, kind="stable")
    same = codes[order][1:] == codes[order][:-1]
    if same.any():
        twice = colors[int(order[1:][same][0])]
        raise UserError(
            f"Colour {twice} is used twice in data.palette, data.reader.masks.colors and ignore_colors: with "
            "format=palette each class needs its own colour."
        )
    return codes[order], np.array(values, dtype=np.uint8)[order]


def _encode_colors(rgb: np.ndarray) -> np.ndarray:
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def _join_some(values: Sequence | np.ndarray) -> str:
    return join_names([str(value) for value in values], 10)
