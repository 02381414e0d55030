"""One image and its mask file: paired by name, read together, known by a fingerprint."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from dinoseg.data.labels import Labels
from dinoseg.data.masks import MaskReader, Masks
from dinoseg.data.video_access import VideoFrame
from dinoseg.data.wording import count_of, listed
from dinoseg.errors import UserError
from dinoseg.images import read_image
from dinoseg.shapes import Sample

_PROPORTIONS = 0.05  # a resized mask may differ so much from its image's proportions


@dataclass(frozen=True)
class Pair:
    """An image, in its own file or in a video, and its mask file; `name` is unique inside the data set."""

    name: str
    image: Path | VideoFrame
    mask: Path


class PairDataset:
    """Images and masks in pairs of files: what every data set of this room is in the end.

    Args:
        pairs: in the order of the data set.
        labels: what the numbers in a mask mean.
        masks: how mask files are written.

    Raises:
        UserError: when an item is read: an unreadable file, differing sizes, ids without class.
    """

    def __init__(self, pairs: Sequence[Pair], labels: Labels, masks: Masks) -> None:
        self.classes, self.palette, self.ignore_index = labels.classes, labels.palette, labels.ignore_index
        self.names = [pair.name for pair in pairs]
        self.pairs = pairs
        self.skipped: Mapping[str, str] = {}  # name and fault of what was left out because it cannot be read
        self.reader = MaskReader(labels, masks)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        return read_pair(self.pairs[index], self.reader)

    def mask(self, index: int) -> np.ndarray:
        """Read a mask (H, W) uint8 alone."""
        return read_mask(self.pairs[index], self.reader)

    def keep(self, names: Collection[str]) -> "PairDataset":
        """Return the data set of only these names, in the same order."""
        pairs = [pair for pair in self.pairs if pair.name in names]
        return PairDataset(pairs, self.reader.labels, self.reader.masks)

    def fingerprint(self) -> str:
        """Return a hash of all that the masks depend on."""
        return fingerprint(self.pairs, self.reader)


def pair_by_name(images: Mapping[str, Path], masks: Mapping[str, Path], where: str) -> list[Pair]:
    """Return the pairs in the order of their names.

    Raises:
        UserError: an image without mask, or a mask without image.
    """
    lacking = []
    if bare := sorted(images.keys() - masks.keys()):
        lacking.append(f"{count_of(bare, 'image')} without mask: {listed(bare)}")
    if lone := sorted(masks.keys() - images.keys()):
        lacking.append(f"{count_of(lone, 'mask')} without image: {listed(lone)}")
    if lacking:
        raise UserError(
            f"{where} has {'; and '.join(lacking)}. Add the missing files or remove the others; an image and "
            "its mask have the same name up to the endings in data.reader.layout."
        )
    return [Pair(name, images[name], masks[name]) for name in sorted(images)]


def read_pair(pair: Pair, reader: MaskReader) -> Sample:
    """Read both files.

    Raises:
        UserError: a file is unreadable, the sizes differ, or the mask holds what is no class.
    """
    image = pair.image.read() if isinstance(pair.image, VideoFrame) else read_image(pair.image)
    mask = _fit(reader.read(pair.mask), (image.shape[0], image.shape[1]), pair, reader.masks.on_size_mismatch)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W)
    return Sample(image=pixels, mask=torch.from_numpy(mask), name=pair.name)


def read_mask(pair: Pair, reader: MaskReader) -> np.ndarray:
    """Read the class ids (H, W) alone, as `read_pair` gives them; the image is opened only if it must be."""
    if reader.masks.on_size_mismatch == "resize_mask":
        return read_pair(pair, reader)["mask"].numpy()
    return reader.read(pair.mask)


def fingerprint(pairs: Iterable[Pair], reader: MaskReader) -> str:
    """Return a hash that changes with the names, any file's size or time, the classes and the mask rules."""
    rules = (reader.labels.classes, reader.labels.ignore_index, reader.labels.palette, reader.masks)
    digest = hashlib.sha256(repr(rules).encode())
    for pair in pairs:
        stamps = [(stat.st_size, stat.st_mtime_ns) for stat in (pair.image.stat(), pair.mask.stat())]
        frame = f"\0{pair.image.index}" if isinstance(pair.image, VideoFrame) else ""
        digest.update(f"{pair.name}\0{stamps}{frame}\n".encode())
    return digest.hexdigest()


def _fit(mask: np.ndarray, size: tuple[int, int], pair: Pair, on_size_mismatch: str) -> np.ndarray:
    if mask.shape == size:
        return mask
    sizes = (
        f"{pair.image} is {size[1]} x {size[0]} (width x height), "
        f"its mask {pair.mask} is {mask.shape[1]} x {mask.shape[0]}."
    )
    if on_size_mismatch == "error":
        raise UserError(f"{sizes} Make them equal, or resize the mask: data.reader.masks.on_size_mismatch=resize_mask.")
    height, width = size[0] / mask.shape[0], size[1] / mask.shape[1]
    if abs(height / width - 1) > _PROPORTIONS:
        raise UserError(
            f"{sizes} Their proportions differ by more than {_PROPORTIONS:.0%}, so resizing would not make "
            "them fit (was one of them turned or cropped?). Correct or remove the pair."
        )
    # pixel centres aligned: plain INTER_NEAREST would shift the mask by up to half a pixel
    return cv2.resize(mask, (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)
