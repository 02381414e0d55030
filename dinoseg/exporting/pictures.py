"""The real pictures on which an export is proven."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from omegaconf import DictConfig

from dinoseg import build
from dinoseg.errors import UserError
from dinoseg.images import write_png
from dinoseg.inference.inputs import is_video, list_inputs

T = TypeVar("T")
_SPLITS = ("train", "val", "test")
_REMEDY = "An export is proven on real pictures before it is kept: give export.images=<folder or pattern of pictures>."


@dataclass(frozen=True)
class Picture:
    """A picture file, and its mask (H, W) uint8 where there is one."""

    path: Path
    mask: np.ndarray | None = None


def pictures(cfg: DictConfig, images: str, count: int, folder: Path) -> list[Picture]:
    """Return pictures spread evenly over a split of the config's data set, a folder, or a pattern's matches.

    Args:
        cfg: the whole config.
        images: train, val or test; or a picture, a folder or a glob pattern.
        count: at most so many.
        folder: where pictures of a data set are written, without loss.

    Raises:
        UserError: there are none: an export is not written unproven.
    """
    if images not in _SPLITS:
        files = [path for path in list_inputs(images, "export.images") if not is_video(path)]
        if not files:
            raise UserError(f"export.images={images}: holds no pictures. {_REMEDY}")
        return [Picture(path) for path in _spread(files, count)]
    try:
        data = build.dataset(cfg, images)
    except UserError as error:
        raise UserError(f"The export cannot be proven on the data set's split {images}: {error} {_REMEDY}") from error
    found = []
    for index in _spread(range(len(data)), count):
        sample, path = data[index], folder / f"{index}.png"
        write_png(path, np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy()))
        found.append(Picture(path, sample["mask"].numpy()))
    if not found:
        raise UserError(f"The export cannot be proven: the data set's split {images} is empty. {_REMEDY}")
    return found


def _spread(items: Sequence[T], count: int) -> list[T]:
    number = min(count, len(items))
    return [items[index * len(items) // number] for index in range(number)]
