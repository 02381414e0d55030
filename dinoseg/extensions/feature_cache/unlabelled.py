"""Images without masks as a training dataset."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from dinoseg.core.sample_maps import get_map_kinds
from dinoseg.core.shapes import Sample, SegmentationData
from dinoseg.core.sources import ImageSource, read_source
from dinoseg.data.pairs.pair import image_hash
from dinoseg.utils.errors import UserError


class Unmasked:
    """Training dataset of images without masks: all their pixels are ignored, and maps hold their fill value.

    Args:
        names: names of the images, unique.
        sources: where to read the images from.
        labels: the labelled dataset, which gives classes, palette, ignored id and the kinds of maps.
    """

    def __init__(self, names: Sequence[str], sources: Sequence[ImageSource], labels: SegmentationData) -> None:
        self.names, self.sources = names, sources
        self.classes, self.palette, self.ignore_index = labels.classes, labels.palette, labels.ignore_index
        self.maps = get_map_kinds(labels)
        self.skipped: Mapping[str, str] = {}

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Sample:
        pixels = np.array(_read(self.sources[index]))
        size = (pixels.shape[0], pixels.shape[1])
        mask = torch.full(size, self.ignore_index, dtype=torch.uint8)
        sample = Sample(image=torch.from_numpy(pixels).permute(2, 0, 1), mask=mask, name=self.names[index])
        if self.maps:
            sample["maps"] = {name: kind.make_empty(size, self.ignore_index) for name, kind in self.maps.items()}
        return sample

    def mask(self, index: int) -> np.ndarray:
        """Return the mask (H, W) uint8 of an image; reads the image for its size."""
        return self[index]["mask"].numpy()

    def image_hash(self, index: int) -> str:
        """Return a hash of the bytes that an image is read from.

        Raises:
            UserError: they cannot be read.
        """
        return image_hash(self.sources[index])


def fault(source: ImageSource) -> str:
    """Return the reason why an image cannot be read, or an empty string if it can."""
    try:
        read_source(source)
    except UserError as error:
        return str(error)
    return ""


def _read(source: ImageSource) -> np.ndarray:
    try:
        return read_source(source)
    except UserError as error:
        raise UserError(f"{error} Or leave such images without masks out: data.on_error=skip.") from error
