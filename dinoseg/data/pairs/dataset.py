"""Dataset of image and mask file pairs, and pairing by name; incomplete pairs are rejected or skipped later."""

import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinoseg.core.channels import PixelFormat, check_rgb
from dinoseg.core.object_ids import OBJECTS
from dinoseg.core.sample_maps import MapKind, ObjectMap, check_maps
from dinoseg.core.shapes import Sample
from dinoseg.core.sources import ImageSource, ObjectSource, first_file, has_own_file, read_source, stated_size
from dinoseg.data.classes.labels import Labels
from dinoseg.data.classes.masks import MaskReader, Masks, check_fit, fit_mask
from dinoseg.data.pairs.pair import Pair, fingerprint, ignore_invalid, image_hash
from dinoseg.utils.errors import UserError
from dinoseg.utils.wording import count_of, list_reasons

ComputeMaps = Callable[[Sample], dict[str, Tensor]]


@dataclass(frozen=True)
class IncompletePair:
    """Incomplete pair, or all incomplete pairs of a video.

    Args:
        name: name of the pair, or of the video's first. It takes part in the split like a complete pair, so that the
            splits do not change when it is fixed.
        reason: the fault, including the file.
        remedy: how to fix it.
        title: name in messages; "": `name`.
    """

    name: str
    reason: str
    remedy: str
    title: str = ""

    @property
    def origin(self) -> str:
        """Return the reason, which includes the file."""
        return self.reason


class PairDataset:
    """Images and masks in pairs of files; all built-in readers return this class.

    Args:
        pairs: the pairs, in the order of the dataset.
        labels: meaning of the ids in a mask.
        masks: how mask files are encoded.
        lacking: name to reason, for entries that are no complete pair: they are not items, but are reported.
        remedy: how to fix them.
        has_layers: whether a mask is (K, H, W), with a layer for each class.

    Raises:
        UserError: when an item is read: an unreadable file, differing sizes, or ids without class.

    Attributes:
        decodes_files: whether reading an item decodes an image file.
    """

    decodes_files = True

    def __init__(
        self,
        pairs: Sequence[Pair],
        labels: Labels,
        masks: Masks,
        lacking: Mapping[str, str] | None = None,
        remedy: str = "",
        *,
        has_layers: bool = False,
    ) -> None:
        self.classes, self.palette, self.ignore_index = labels.classes, labels.palette, labels.ignore_index
        self.names = [pair.name for pair in pairs]
        self.pairs = pairs
        self.lacking: Mapping[str, str] = lacking or {}
        self.remedy = remedy
        self.skipped: Mapping[str, str] = {}  # name to fault, of the pairs that `data.on_error=skip` left out
        self.maps: Mapping[str, MapKind] = {}
        self.compute_maps: ComputeMaps | None = None
        # errors of the labels that only the reader can know, see `ScannedSplit`
        self.check_labels: Callable[[Sequence[Any]], Iterable[Any]] | None = None
        self.split_local_names = False  # equal names (of images or videos) in two splits are different data
        self.longest: int | None = None  # pixels that an image's longer side is reduced to; None: original size
        self.reader = MaskReader(labels, masks, has_layers=has_layers)

    @property
    def has_layers(self) -> bool:
        """Return whether a mask is (K, H, W), with a layer for each class."""
        return self.reader.has_layers

    @property
    def source(self) -> "PairDataset":
        """Dataset of the original files, if this one is derived from another."""
        return self

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        return self.add_maps(read_pair(self.pairs[index], self.reader))

    def with_maps(self, maps: Mapping[str, MapKind], compute: ComputeMaps) -> "PairDataset":
        """Return the dataset with maps that are computed from each sample whenever it is read, like its objects.

        Args:
            maps: their kinds by name.
            compute: maps a sample to its maps by name. With `data.cache=packed`, the sample is the packed one, which
                may be smaller than its file. A process may load the data: define the function in a module.
        """
        dataset = copy(self)
        objects = {OBJECTS: self.maps[OBJECTS]} if OBJECTS in self.maps else {}
        dataset.maps, dataset.compute_maps = {**objects, **maps}, compute
        return dataset

    def add_maps(self, sample: Sample) -> Sample:
        """Add the maps, if there are any, to a sample of this dataset, and return it.

        Raises:
            UserError: a map is missing, or has another shape or type than declared.
        """
        if self.compute_maps is not None:
            size = (sample["image"].shape[-2], sample["image"].shape[-1])
            maps = {**sample.get("maps", {}), **self.compute_maps(sample)}
            sample["maps"] = check_maps(maps, self.maps, size, f"The sample {sample['name']}")
        return sample

    def mask(self, index: int) -> np.ndarray:
        """Return the mask (H, W) uint8 alone."""
        return read_mask(self.pairs[index], self.reader)

    def image_hash(self, index: int) -> str:
        """Return a hash of the bytes that an image is read from."""
        return image_hash(self.pairs[index].image)

    def keep(self, names: Collection[str]) -> "PairDataset":
        """Return the dataset restricted to these names, in the same order; incomplete pairs are still reported."""
        return self.with_pairs([pair for pair in self.pairs if pair.name in names])

    def with_pairs(self, pairs: Sequence[Pair]) -> "PairDataset":
        """Return the dataset with other pairs."""
        dataset = copy(self)
        dataset.pairs = pairs
        dataset.names = [pair.name for pair in pairs]
        return dataset

    def with_objects(self, sources: Sequence[ObjectSource], things: Collection[int]) -> "PairDataset":
        """Return the dataset with the map `objects`, see `ObjectMap`.

        Args:
            sources: where the objects of each pair come from.
            things: ids of the classes that have objects.
        """
        pairs = [replace(pair, objects=source) for pair, source in zip(self.pairs, sources, strict=True)]
        dataset = self.with_pairs(pairs)
        dataset.maps = {**self.maps, OBJECTS: ObjectMap(things=tuple(sorted(things)))}
        return dataset

    def read_as(self, pixels: PixelFormat) -> "PairDataset":
        """Return the dataset with its images read in a format.

        Raises:
            UserError: an image is a frame of a video, and the format is not RGB.
        """
        pairs = []
        for pair in self.pairs:
            if not has_own_file(pair.image):
                check_rgb(pixels, str(pair.image))
                pairs.append(pair)
            else:
                pairs.append(replace(pair, image=pixels.source(first_file(pair.image))))
        return self.with_pairs(pairs)

    def fingerprint(self) -> str:
        """Return a hash of everything that the masks depend on."""
        return fingerprint(self.pairs, self.reader)


def read_pair(pair: Pair, reader: MaskReader) -> Sample:
    """Read the image, the mask and, where there are some, the objects of a pair.

    Raises:
        UserError: a file is unreadable, the sizes differ, or the mask holds a value without class.
    """
    image = read_source(pair.image)
    size, rule = (image.shape[0], image.shape[1]), reader.masks.on_size_mismatch
    drawn = stated_size(pair.mask)
    if drawn is not None:  # before it is drawn: a wrong size in an annotation file could fill the memory
        check_fit(drawn, size, rule, image=pair.image, path=pair.mask)
    mask = fit_mask(reader.read(pair.mask), size, rule, image=pair.image, path=pair.mask)
    mask = ignore_invalid(mask, pair.image, reader.labels.ignore_index, rule=rule, path=pair.mask)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (C, H, W)
    sample = Sample(image=pixels, mask=torch.from_numpy(mask), name=pair.name)
    if pair.objects is not None:
        sample["maps"] = {OBJECTS: read_objects(pair.objects, size, rule, pair.image)}
    return sample


def read_objects(objects: ObjectSource, size: tuple[int, int], rule: str, image: ImageSource) -> Tensor:
    """Return the objects (N, H, W) of an image of `size` (H, W), 0 where `ignore_invalid` ignores the mask.

    The other arguments are those of `fit_mask`.

    Raises:
        UserError: a file is unreadable, or the sizes differ.
    """
    layers = [fit_mask(layer, size, rule, image=image, path=objects) for layer in objects.read()]
    stacked = np.array(layers, np.int32).reshape(-1, *size)
    return torch.from_numpy(ignore_invalid(stacked, image, 0, rule=rule, path=objects))


def read_mask(pair: Pair, reader: MaskReader) -> np.ndarray:
    """Return the class ids (H, W) alone, equal to those of `read_pair`.

    Only a TIFF image, which may have an internal mask, or one whose size is needed, is opened.
    """
    rule = reader.masks.on_size_mismatch
    if rule == "resize_mask":
        return read_pair(pair, reader)["mask"].numpy()
    return ignore_invalid(reader.read(pair.mask), pair.image, reader.labels.ignore_index, rule=rule, path=pair.mask)


def pair_by_name(
    images: Mapping[str, Path], masks: Mapping[str, Path], folders: tuple[Path, Path], remedy: str
) -> dict[str, Pair | IncompletePair]:
    """Return the pairs, and the images and masks without counterpart, by name.

    Args:
        images: name to file.
        masks: name to file.
        folders: folders of the images and of the masks.
        remedy: how to fix images or masks without counterpart.
    """
    by_name: dict[str, Pair | IncompletePair] = {
        name: Pair(name, images[name], masks[name]) for name in images.keys() & masks
    }
    if images.keys() != masks.keys():
        reasons = {
            **_explain_lacking(images, masks, "mask", folders[1]),
            **_explain_lacking(masks, images, "image", folders[0]),
        }
        by_name |= {name: IncompletePair(name, reason, remedy) for name, reason in reasons.items()}
    return by_name


def _explain_lacking(files: Mapping[str, Path], others: Mapping[str, Path], kind: str, folder: Path) -> dict[str, str]:
    """Return the reason of each name of files without counterpart; `kind` and `folder` are those of the others."""
    twins = {_normalise_name(name): path for name, path in others.items() if name not in files}
    reasons = {}
    for name in files.keys() - others.keys():
        reasons[name] = f"{files[name]} has no {kind} in {folder}."
        if twin := twins.get(_normalise_name(name)):
            reasons[name] += f" {twin} only looks the same: one has accents as separate characters (Unicode "
            reasons[name] += "NFD, as macOS writes them), the other does not (NFC). Rename one."
    return reasons


def collect_pairs(
    candidates: Iterable[Pair | IncompletePair], split: str, labels: Labels, masks: Masks, *, has_layers: bool = False
) -> PairDataset:
    """Return the dataset of the complete pairs; it records the incomplete ones.

    Raises:
        UserError: no pair is complete.
    """
    whole: list[Pair] = []
    lacking: dict[str, str] = {}
    remedies: dict[str, None] = {}  # ordered set
    for candidate in candidates:
        if isinstance(candidate, Pair):
            whole.append(candidate)
        else:
            lacking[candidate.title or candidate.name] = candidate.reason
            remedies[candidate.remedy] = None
    dataset = PairDataset(whole, labels, masks, lacking, "\n".join(remedies), has_layers=has_layers)
    if not whole:
        raise incomplete_pairs_error(dataset, split)
    return dataset


def incomplete_pairs_error(dataset: PairDataset, split: str) -> UserError:
    """Return the error that lists the incomplete pairs."""
    lacking = dataset.lacking
    if not len(dataset):
        return UserError(f"Split {split} has no image with its mask:{list_reasons(lacking)}\n{dataset.remedy}")
    return UserError(
        f"Split {split} has {count_of(dataset.pairs, 'image')} with a mask, and {len(lacking)} incomplete "
        f"pairs:{list_reasons(lacking)}\n{dataset.remedy}\nTo leave them out: on_error=skip. "
        "mode=doctor lists all, in doctor.json."
    )


def _normalise_name(name: str) -> str:
    return unicodedata.normalize("NFC", name)
