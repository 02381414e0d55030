"""Parallel reading and reduction of the items of a packed store, in order."""

import functools
from collections.abc import Generator
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from dinoseg.core.object_ids import OBJECTS
from dinoseg.core.sample_maps import ObjectMap
from dinoseg.core.sizes import backbone_size
from dinoseg.data.pairs.dataset import PairDataset
from dinoseg.data.transforms import Augment
from dinoseg.extensions.packed.store import checksum
from dinoseg.utils.cores import count_cores
from dinoseg.utils.errors import UserError
from dinoseg.utils.workers import in_processes

_PAYS_FROM = 50  # items read in the time that a process takes to start
_MAX = 8  # further processes would wait for the writer


@dataclass(frozen=True)
class Packed:
    """Item to pack: image (H, W, C), uint8 or uint16, mask (H, W) uint8, objects (N, H, W) int32, their checksum."""

    image: np.ndarray
    mask: np.ndarray
    objects: np.ndarray
    crc: int


def read_all(
    dataset: PairDataset, longest: int | None, workers: int
) -> Generator[tuple[int, Packed | UserError], None, None]:
    """Return an iterator over each row, in order, with its item or the error of its files.

    Raises:
        UserError: a process was killed.
    """
    return in_processes(
        functools.partial(_read, dataset=dataset, longest=longest),
        range(len(dataset)),
        workers,
        catch=UserError,
        start=_use_one_thread,
        remedy=f"Set fewer than workers={workers} and run again.",
    )


def paying_workers(items: int) -> int:
    """Return the number of processes that is worth starting for `items` items on this machine."""
    return max(1, min(count_cores(), items // _PAYS_FROM, _MAX))


def downscale_sample(
    image: np.ndarray, mask: np.ndarray, longest: int | None, ignore_index: int, objects: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return image, mask and objects reduced to `longest` exactly as by `Augment` without any other change."""
    height, width = mask.shape
    size = backbone_size((height, width), 1.0, longest)
    if size == (height, width):
        return image, mask, objects
    augment = Augment(size, longest=longest, ignore_index=ignore_index)
    rng = np.random.default_rng(0)  # no random number has an effect here
    if not len(objects):
        return *augment(image, mask, rng), objects.reshape(0, *size)
    maps = augment.maps({OBJECTS: objects}, {OBJECTS: ObjectMap()}, mask, rng)
    return *augment(image, mask, rng), maps[OBJECTS]


def _read(row: int, *, dataset: PairDataset, longest: int | None) -> Packed:
    sample = dataset[row]
    pixels = np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy())  # (H, W, C)
    mask = sample["mask"].numpy()
    maps = sample.get("maps", {})
    objects = maps[OBJECTS].numpy() if OBJECTS in maps else np.zeros((0, *mask.shape), np.int32)
    image, mask, objects = downscale_sample(pixels, mask, longest, dataset.ignore_index, objects)
    return Packed(image, mask, objects, checksum(sample["name"], image, mask, objects))


def _use_one_thread() -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
