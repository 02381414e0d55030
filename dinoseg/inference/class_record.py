"""`classes.json` of a prediction folder: the classes of its IDs and the encoding of the reference masks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import MaskReader, Masks, fit_mask
from dinoseg.utils import forms
from dinoseg.utils.atomic import write_json
from dinoseg.utils.errors import UserError

NAME = "classes.json"
_FORM = forms.record(
    classes=forms.list_of(forms.text),
    palette=forms.list_of(forms.list_of(forms.whole(0, 255), 3)),
    ignore_index=forms.whole(0, 255),
    masks=forms.table(forms.plain),
    has_layers=forms.flag,
)


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
) -> None:
    """Write the classes of predicted IDs or layers; `masks` holds the arguments of `Masks` for the dataset's masks."""
    colors = [list(color) for color in palette]
    record = {"classes": list(classes), "palette": colors, "ignore_index": ignore_index, "masks": dict(masks)}
    write_json(folder / NAME, {**record, "has_layers": has_layers})


def read_class_record(folder: Path, *, has_layers: bool = False) -> tuple[Labels, dict[str, Any]] | None:
    """Return the classes and the arguments of `Masks` saved with a folder of predictions; None without such a record.

    Raises:
        UserError: the file exists but is not a valid record, or its masks are of another task.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        record = forms.read_json(path, _FORM)
        labels = Labels.of(record["classes"], record["palette"], record["ignore_index"])
    except (OSError, forms.SchemaError, UserError) as error:
        raise UserError(
            f"{path} is not a valid class record ({error}). Remove it and give num_classes, or predict again."
        ) from None
    if record["has_layers"] != has_layers:
        task = "multilabel" if record["has_layers"] else "semantic"
        raise UserError(f"{folder} holds predictions of task={task}. Set protocol={task}, or give other predictions.")
    return labels, record["masks"]


def references(labels: Labels, masks: Mapping[str, Any], *, has_layers: bool = False) -> References:
    """Return a reader of reference masks for these classes, or with layers, of a mask of one class.

    Raises:
        UserError: the arguments of `Masks` are invalid.
    """
    return References(MaskReader(labels, Masks(**masks), has_layers=has_layers))
