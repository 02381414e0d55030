"""Files of predicted masks: one PNG for all classes, or one for each class of a mask with layers; imports no torch."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dinoseg.utils.errors import UserError
from dinoseg.utils.images import write_png

_FORBIDDEN = {*'/\\:*?"<>|'}  # in names of files, by some system


def check_layer_names(classes: Sequence[str]) -> None:
    """Refuse names of classes that cannot be names of files and folders, or not of different ones, on any system.

    Raises:
        UserError: naming the class.
    """
    known: dict[str, str] = {}
    for name in classes:
        other = known.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name or _FORBIDDEN & {*name} or name.strip(". ") != name:
            raise UserError(
                f"The class {name} has masks of its own, and its name cannot be that of a file which differs from all "
                "others on every system. Rename it."
            )


def mask_paths(folder: Path, name: str, layers: Sequence[str]) -> list[Path]:
    """Return the files of a mask: FOLDER/NAME.png, or FOLDER/LAYER/NAME.png for each layer, as data=folder reads it.

    Args:
        folder: of the masks.
        name: of the image, a relative path without suffix.
        layers: names of the classes, if each has a layer; empty for class ids.

    Raises:
        UserError: see `check_layer_names`.
    """
    check_layer_names(layers)
    return [folder / layer / f"{name}.png" for layer in layers] or [folder / f"{name}.png"]


def write_masks(folder: Path, name: str, mask: np.ndarray, layers: Sequence[str]) -> None:
    """Write a mask (H, W) of class ids, or (K, H, W) of 0 and 1, to its `mask_paths`."""
    for path, layer in zip(mask_paths(folder, name, layers), mask if layers else [mask], strict=True):
        write_png(path, layer.astype(np.uint8, copy=False))
