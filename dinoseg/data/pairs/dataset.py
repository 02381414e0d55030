"""A data set of images and masks in pairs of files."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch

from dinoseg.core.shapes import Sample
from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.mask_size import fit_mask
from dinoseg.data.classes.masks import MaskReader, Masks
from dinoseg.data.pairs.pair import Pair, fingerprint, image_hash
from dinoseg.data.video.access import read_source


class PairDataset:
    """Images and masks in pairs of files: what every data set of this room is in the end.

    Args:
        pairs: in the order of the data set.
        labels: what the numbers in a mask mean.
        masks: how mask files are written.
        lacking: name to reason of what belongs to the data set and is no whole pair: no item, and to be told.
        remedy: what to do about these.

    Raises:
        UserError: when an item is read: an unreadable file, differing sizes, ids without class.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        labels: Labels,
        masks: Masks,
        lacking: Mapping[str, str] | None = None,
        remedy: str = "",
    ) -> None:
        self.classes, self.palette, self.ignore_index = labels.classes, labels.palette, labels.ignore_index
        self.names = [pair.name for pair in pairs]
        self.pairs = pairs
        self.lacking: Mapping[str, str] = lacking or {}
        self.remedy = remedy
        self.skipped: Mapping[str, str] = {}  # name and fault of what was left out on request
        self.split_local_names = False  # a name, or the video in it, in another split means other data
        self.longest: int | None = None  # pixels that an image's longer side is reduced to; None: it is as its file
        self.reader = MaskReader(labels, masks)

    @property
    def source(self) -> "PairDataset":
        """The data set of the files themselves, where this one is made of another."""
        return self

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        return read_pair(self.pairs[index], self.reader)

    def mask(self, index: int) -> np.ndarray:
        """Read a mask (H, W) uint8 alone."""
        return read_mask(self.pairs[index], self.reader)

    def image_hash(self, index: int) -> str:
        """Return a hash of the bytes that an image is read from.

        Raises:
            UserError: they cannot be read.
        """
        return image_hash(self.pairs[index].image)

    def keep(self, names: Collection[str]) -> "PairDataset":
        """Return the data set of only these names, in the same order; what was no pair before is still told."""
        pairs = [pair for pair in self.pairs if pair.name in names]
        subset = PairDataset(pairs, self.reader.labels, self.reader.masks, self.lacking, self.remedy)
        subset.skipped, subset.split_local_names = self.skipped, self.split_local_names
        return subset

    def fingerprint(self) -> str:
        """Return a hash of all that the masks depend on."""
        return fingerprint(self.pairs, self.reader)


def read_pair(pair: Pair, reader: MaskReader) -> Sample:
    """Read both files.

    Raises:
        UserError: a file is unreadable, the sizes differ, or the mask holds what is no class.
    """
    image = read_source(pair.image)
    size, rule = (image.shape[0], image.shape[1]), reader.masks.on_size_mismatch
    mask = fit_mask(reader.read(pair.mask), size, rule, image=pair.image, path=pair.mask)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W)
    return Sample(image=pixels, mask=torch.from_numpy(mask), name=pair.name)


def read_mask(pair: Pair, reader: MaskReader) -> np.ndarray:
    """Read the class ids (H, W) alone, as `read_pair` gives them; the image is opened only if it must be."""
    if reader.masks.on_size_mismatch == "resize_mask":
        return read_pair(pair, reader)["mask"].numpy()
    return reader.read(pair.mask)
