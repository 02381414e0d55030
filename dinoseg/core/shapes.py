"""Data types shared by all packages: batches, outputs, predictions and the dataset protocol.

Axis letters in all comments and docstrings:
B batch, T time, C channels, H W pixels, h w patch grid, K classes, Q queries, L layers read as maps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, NotRequired, Protocol, Self, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.class_ids import argmax_ids, class_ids, mixed_class_ids
from dinoseg.core.geometry import unify_depth, upsample_at
from dinoseg.core.objects import Objects
from dinoseg.core.task import SEMANTIC, ObjectTask, Task
from dinoseg.utils.devices import to_device

Palette = Sequence[tuple[int, int, int]]


class SampleLabels(TypedDict):
    """Labels of a sample."""

    mask: Tensor  # (H, W) uint8, class ids 0..K-1, ignore_index = ignore; task=multilabel: (K, H, W) of 0 and 1
    name: str  # unique in the dataset, a relative path without its suffix
    maps: NotRequired[dict[str, Tensor]]  # by name: (H, W) or (N, H, W), as the dataset declares them


class Sample(SampleLabels):
    """Sample of a dataset."""

    image: Tensor  # (C, H, W) uint8 or uint16; three channels are RGB


class StackedSamples:
    """Base class of batches: each tensor, alone or in lists and dicts, has the samples as its first axis."""

    names: list[str]

    def to(self, device: torch.device) -> Self:
        """Copy to `device`."""
        return tree_map(self, partial(to_device, device=device))

    def pin_memory(self) -> Self:
        """Copy to pinned memory, from which CUDA copies asynchronously."""
        return tree_map(self, Tensor.pin_memory)

    def select(self, samples: slice) -> Self:
        """Return some of the samples, as views of the tensors."""
        return replace(tree_map(self, lambda part: part[samples]), names=self.names[samples])

    def split(self, parts: int) -> list[Self]:
        """Split the samples in their order into batches whose sizes differ by at most one sample."""
        return [self.select(samples) for samples in split_slices(len(self.names), parts)]


@dataclass
class Batch(StackedSamples):
    """Samples of one size, stacked."""

    image: Tensor  # (B, C, H, W) uint8 or uint16
    mask: Tensor  # (B, H, W) uint8; task=multilabel: (B, K, H, W)
    names: list[str]
    maps: dict[str, Tensor] = field(default_factory=dict)  # by name: (B, H, W) or (B, N, H, W)

    @property
    def count(self) -> int:
        """Return the number of images."""
        return len(self.names)

    @classmethod
    def stack(cls, samples: Sequence[Sample]) -> Self:
        """Stack samples of equal size."""
        return cls(torch.stack(unify_depth([sample["image"] for sample in samples])), **stack_labels(samples))

    @classmethod
    def of_masks(cls, masks: Tensor) -> Self:
        """Return masks (B, H, W) as a batch without images of its own, for losses, which do not read these."""
        return cls(masks, masks, [f"image {number}" for number in range(len(masks))])


def stack_labels(samples: Sequence[SampleLabels]) -> dict[str, Any]:
    """Stack the labels of samples of equal size; return them by the name of the field of `Batch`."""
    maps = samples[0].get("maps", {})
    return {
        "mask": torch.stack([sample["mask"] for sample in samples]),
        "names": [sample["name"] for sample in samples],
        "maps": {name: torch.stack(pad_layers([sample["maps"][name] for sample in samples], ndim=3)) for name in maps},
    }


def pad_layers(maps: Sequence[Tensor], *, ndim: int) -> list[Tensor]:
    """Return maps (..., N, H, W) of `ndim` axes with equally many layers, which differ in maps of objects.

    Further layers are 0, no object. Maps of fewer axes have no layers and are unchanged.
    """
    if maps[0].ndim < ndim:
        return list(maps)
    most = max(each.shape[-3] for each in maps)
    return [F.pad(each, (0, 0, 0, 0, 0, most - each.shape[-3])) for each in maps]


def join_batches(batches: Sequence[Batch]) -> Batch:
    """Concatenate batches of images of one size, with the same maps in one order, that of their dataset."""
    for name in batches[0].maps:
        padded = pad_layers([batch.maps[name] for batch in batches], ndim=4)
        batches = [replace(batch, maps={**batch.maps, name: maps}) for batch, maps in zip(batches, padded, strict=True)]
    columns = zip(*map(collect_tensors, batches), strict=True)
    joined = tree_map(batches[0], lambda _: torch.cat(unify_depth(next(columns))))
    return replace(joined, names=[name for batch in batches for name in batch.names])


def split_slices(count: int, parts: int) -> list[slice]:
    """Return consecutive slices of a list of `count` items, whose lengths differ by at most one."""
    whole, more = divmod(count, parts)
    ends = [number * whole + min(number, more) for number in range(parts + 1)]
    return [slice(first, last) for first, last in pairwise(ends)]


@dataclass
class FrozenFeatures:
    """Output of a model's frozen part for images, which the trained part takes instead of the images."""

    tensors: list[Tensor]  # tokens (B, N, C) or maps (B, C, h, w); uint8 and uint16 ones are pixels, never converted
    size: tuple[int, int]  # (H, W) of the images
    seen: tuple[int, int]  # (H, W) at which they enter the backbone


@dataclass
class FeatureBatch(Batch):
    """Batch with frozen features instead of images."""

    image: FrozenFeatures  # type: ignore[assignment]


@dataclass
class MaskOutputs:
    """Output of a mask-classification head: Q masks per image, and their class logits."""

    class_logits: Tensor  # (B, Q, K + 1), the last column means "no object"; (B, Q, K) for a head without it
    mask_logits: Tensor  # (B, Q, h, w)
    aux: list[MaskOutputs] = field(default_factory=list)  # of earlier layers, for deep supervision; empty in eval mode


class WeightedMasks(NamedTuple):
    """Masks to be mixed: a class's score is the sum over masks of share times sigmoid of the upsampled logits.

    Both tensors are at least float32.
    """

    logits: Tensor  # (B, Q, h, w)
    shares: Tensor  # (B, Q, K), at least 0


@dataclass
class Prediction:
    """A head's outputs and their position on the image; losses and metrics choose the size that they need.

    `valid` is the share of the outputs' height and width that the image covers, from the top left. The rest is padding
    to the patch multiple. `mixture` states that the head's scores are sums of probabilities, as in mask
    classification, and not logits. `task` states what scores mean and which masks they give.
    """

    outputs: object  # of the head's own type
    size: tuple[int, int]  # (H, W) of the input images
    valid: tuple[float, float]
    to_pixels: Callable[[Any, tuple[int, int], tuple[float, float]], Tensor]
    mixture: bool = False
    grid: Tensor | None = None  # (B, K, h, w), if the scores are its `geometry.upsample`
    masks: WeightedMasks | None = None  # if the scores are a mixture of masks
    task: Task = SEMANTIC

    def scores(self, size: tuple[int, int] | None = None) -> Tensor:
        """Return per-pixel class scores (B, K, H, W) at `size` (default: that of the images); the highest wins.

        Heads return them in float32 or better, see `upsample`.
        """
        scores = self.to_pixels(self.outputs, size or self.size, self.valid)
        return self.task.pixel_scores(scores) if isinstance(self.outputs, MaskOutputs) else scores

    def class_ids(self, size: tuple[int, int] | None = None) -> Tensor:
        """Return the IDs (B, H, W) uint8 of the classes with the highest `scores`; of layers, 0 and 1 (B, K, H, W).

        Ties go to the first class, up to rounding: see `class_ids.py`.
        """
        if self.task.has_layers:
            return self.task.decide(self.probabilities(size))
        if self.grid is not None:
            return class_ids(self.grid, size or self.size, self.valid)
        if self.masks is not None:
            return mixed_class_ids(*self.task.class_masks(*self.masks), size or self.size, self.valid)
        return argmax_ids(self.scores(size))

    def class_ids_and_logits(self, places: tuple[slice, slice]) -> tuple[Tensor, Tensor]:
        """Return `class_ids`, and `logits` (B, K, r, c) float32 at some rows and columns, at the size of the images."""
        if self.grid is not None:
            return self.class_ids(), upsample_at(self.grid, self.size, self.valid, places).float()
        if self.masks is not None:
            pixels = upsample_at(self.masks.logits, self.size, self.valid, places).sigmoid()
            with torch.autocast(pixels.device.type, enabled=False):
                mixed = torch.einsum("bqk,bqhw->bkhw", self.masks.shares, pixels)
            return self.class_ids(), self.as_logits(self.task.pixel_scores(mixed))
        scores = self.scores()
        chosen = self.as_logits(scores[:, :, places[0], places[1]]).float().clone()  # a band is overwritten by the next
        if self.task.has_layers:
            return self.task.decide(self.task.probabilities(self.as_logits(scores).float())), chosen
        return argmax_ids(scores), chosen

    def objects(self, size: tuple[int, int] | None = None) -> list[Objects]:
        """Return the objects of each image at `size` (default: that of the images), of an `ObjectTask`."""
        task, outputs = self.task, self.outputs
        assert isinstance(task, ObjectTask) and isinstance(outputs, MaskOutputs), "`SegmentationModel` refuses others"
        return task.find_objects(outputs.class_logits, outputs.mask_logits, size or self.size, self.valid)

    def of_images(self, images: slice) -> Prediction:
        """Return the prediction for some of the images."""
        parts = {
            name: tree_map(getattr(self, name), lambda part: part[images]) for name in ("outputs", "grid", "masks")
        }
        return replace(self, **parts)

    def logits(self, size: tuple[int, int] | None = None) -> Tensor:
        """Return `scores` as logits, of which `task.probabilities` gives the class probabilities."""
        return self.as_logits(self.scores(size))

    def probabilities(self, size: tuple[int, int] | None = None) -> Tensor:
        """Return the class probabilities (B, K, H, W) float32 at `size` (default: that of the images)."""
        return self.task.probabilities(self.logits(size).float())

    def as_logits(self, scores: Tensor) -> Tensor:
        """Convert some of `scores` to `logits`."""
        return self.task.logits(scores) if self.mixture else scores


def tree_map(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a head's outputs with `change` applied to each tensor, alone or in lists, dicts and dataclasses."""
    if isinstance(outputs, Tensor):
        return change(outputs)
    if isinstance(outputs, list | tuple):
        parts = [tree_map(part, change) for part in outputs]
        return type(outputs)(*parts) if hasattr(outputs, "_fields") else type(outputs)(parts)
    if isinstance(outputs, dict):
        return {key: tree_map(part, change) for key, part in outputs.items()}
    if is_dataclass(outputs) and not isinstance(outputs, type):
        return replace(
            outputs, **{part.name: tree_map(getattr(outputs, part.name), change) for part in fields(outputs)}
        )
    return outputs


def collect_tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors of a head's outputs, or of a batch, in their order."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    tree_map(outputs, collect)
    return found


class SegmentationData(Protocol):
    """Map-style dataset of images and masks with remapped labels.

    `dinoseg.data.custom.check_custom_dataset` returns one for a class that lacks only `skipped`. A dataset
    may have `maps`, see `sample_maps.get_map_kinds`.
    """

    @property
    def classes(self) -> Sequence[str]:
        """Return the class names in the order of their IDs."""
        ...

    @property
    def palette(self) -> Palette:
        """Return an RGB colour for each class."""
        ...

    @property
    def ignore_index(self) -> int:
        """Return the ignored mask ID."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Return the sample names in order."""
        ...

    @property
    def skipped(self) -> Mapping[str, str]:
        """Return the samples that were excluded on request: name to reason."""
        ...

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Return one sample."""
        ...
