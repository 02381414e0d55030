"""`classes.json` of a prediction folder: the classes of its IDs, the reference masks' encoding, images' groups."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import MaskReader, Masks, fit_mask
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError

MASK_FOLDER = "masks"  # in a run folder of mode=predict: id masks and their class record
CLASS_RECORD = "classes.json"


@dataclass(frozen=True)
class ClassRecord:
    """Classes of a folder of predictions.

    Args:
        labels: the classes.
        masks: arguments of `Masks` for the dataset's masks.
        groups: the group of each image by its name, such as its video (`data.group`); empty without groups.
    """

    labels: Labels
    masks: dict[str, Any]
    groups: dict[str, str]


@dataclass(frozen=True)
class References:
    """Reader of reference masks with the encoding of the dataset's own masks."""

    reader: MaskReader

    def __call__(self, path: Path, prediction: Path | None = None, size: tuple[int, int] | None = None) -> np.ndarray:
        """Return class IDs and ignore_index (H, W) uint8, fitted to the prediction's `size` if given.

        Raises:
            UserError: the file is unreadable, has another size, or contains values that are no class.
        """
        ids = self.reader.read(path)
        return (
            ids
            if size is None
            else fit_mask(ids, size, self.reader.masks.on_size_mismatch, image=prediction, path=path)
        )


def write_class_record(
    folder: Path,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    ignore_index: int,
    masks: Mapping[str, Any],
    *,
    has_layers: bool = False,
    groups: Mapping[str, str | None] | None = None,
) -> None:
    """Write the classes of predicted IDs or layers.

    Args:
        folder: folder of the predictions.
        classes: class names.
        palette: one colour per class.
        ignore_index: ID of ignored pixels.
        masks: arguments of `Masks` for the dataset's masks.
        has_layers: whether each class has masks of its own.
        groups: the group, or None, of each image by its name. The record keeps its groups of other images.
    """
    stored: dict[str, str] = {}
    with suppress(UserError):  # a damaged record is replaced
        earlier = read_class_record(folder, has_layers=has_layers)
        stored = {} if earlier is None else earlier.groups
    merged = {**stored, **(groups or {})}
    record = {
        "classes": list(classes),
        "palette": [list(color) for color in palette],
        "ignore_index": ignore_index,
        "masks": dict(masks),
        "has_layers": has_layers,
        "groups": {name: group for name, group in merged.items() if group is not None},
    }
    write_json(folder / CLASS_RECORD, record)


def read_class_record(folder: Path, *, has_layers: bool = False) -> ClassRecord | None:
    """Return the record of a folder of predictions; None without one.

    Raises:
        UserError: the file exists but is not a valid record, or its masks are of another task.
    """
    path = folder / CLASS_RECORD
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        labels = Labels.of(content["classes"], content["palette"], content["ignore_index"])
        record = ClassRecord(labels, content["masks"], content["groups"])
        recorded = content["has_layers"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is not a valid class record ({error}). Remove it and give num_classes, or predict again."
        ) from None
    if recorded != has_layers:
        task = "multilabel" if recorded else "semantic"
        raise UserError(f"{folder} holds predictions of task={task}. Set protocol={task}, or give other predictions.")
    return record


def references(labels: Labels, masks: Mapping[str, Any], *, has_layers: bool = False) -> References:
    """Return a reader of reference masks for these classes, or with layers, of a mask of one class.

    Raises:
        UserError: the arguments of `Masks` are invalid.
    """
    return References(MaskReader(labels, Masks(**masks), has_layers=has_layers))
