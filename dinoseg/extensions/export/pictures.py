"""Real images on which an export is verified."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from dinoseg.core.channels import PixelFormat
from dinoseg.core.shapes import SegmentationData
from dinoseg.core.sizes import Size
from dinoseg.core.splits import SPLITS
from dinoseg.inference.inputs import list_inputs
from dinoseg.inference.memory import free_bytes
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import in_bytes

T = TypeVar("T")
_COPIES = 4  # class-score arrays of an image in memory at once
_REMEDY = "An export is verified on real images before it is saved: set export.images=<folder or pattern of images>."


@dataclass(frozen=True)
class Picture:
    """An image file, its name for the report, its (H, W), format, and its mask (H, W) uint8 where there is one."""

    path: Path
    name: str
    size: Size
    format: PixelFormat = PixelFormat()
    mask: np.ndarray | None = None

    def read(self) -> np.ndarray:
        """Return the image (H, W, C), uint8 or uint16."""
        return self.format.read(self.path)


def pictures(
    images: str,
    count: int,
    folder: Path,
    *,
    dataset: Callable[[str], SegmentationData],
    num_classes: int,
    pixels: PixelFormat = PixelFormat(),  # noqa: B008 (frozen)
) -> list[Picture]:
    """Return images spread evenly over a split of a dataset, a folder, or a pattern's matches.

    Each file is read once, so that invalid ones are reported here.

    Args:
        images: train, val or test; or an image, a folder or a glob pattern.
        count: largest number of images.
        folder: receives the images of a dataset, without loss.
        dataset: returns a split.
        num_classes: number of class scores of a pixel that are compared.
        pixels: format of the images in files.

    Raises:
        UserError: if there are no images, since an unverified export is never written. Also if an image is invalid or
            too large to be compared.
    """
    found = list(_of_split(dataset, images, count, folder) if images in SPLITS else _of_files(images, count, pixels))
    if not found:
        raise UserError(f"The export cannot be verified: the dataset's split {images} is empty. {_REMEDY}")
    free = free_bytes(torch.device("cpu"))
    for picture in found:
        needed = _COPIES * 4 * num_classes * math.prod(picture.size)
        if needed > free:
            raise UserError(
                f"{picture.name} ({picture.size[0]} x {picture.size[1]}) needs {in_bytes(needed)} for the "
                f"comparison of scores, and {in_bytes(free)} are free. Set export.images to smaller images."
            )
    return found


def _of_split(dataset: Callable[[str], SegmentationData], split: str, count: int, folder: Path) -> Iterator[Picture]:
    try:
        data = dataset(split)
        for index in _spread(range(len(data)), count):
            sample, path = data[index], folder / f"{index}.npy"
            image = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())
            np.save(path, image)
            # its channels are already in order, and in the range of their type
            stored = PixelFormat(image.shape[2], order=range(image.shape[2]))
            size = (image.shape[0], image.shape[1])
            yield Picture(path, str(sample["name"]), size, stored, sample["mask"].numpy())
    except UserError as error:
        raise UserError(f"The export cannot be verified on the dataset's split {split}: {error} {_REMEDY}") from error


def _of_files(images: str, count: int, pixels: PixelFormat) -> Iterator[Picture]:
    files = list_inputs(images, "export.images", pixels.suffixes)
    for path in _spread(files, count):
        height, width, _ = pixels.read(path).shape
        yield Picture(path, path.name, (height, width), pixels)


def _spread(items: Sequence[T], count: int) -> list[T]:
    number = min(count, len(items))
    return [items[index * len(items) // number] for index in range(number)]
