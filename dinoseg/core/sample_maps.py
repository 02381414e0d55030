"""Maps of a sample: values per pixel besides its mask, and how each kind is resampled with it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoseg.core.object_ids import encode_object
from dinoseg.utils.errors import UserError

_LARGEST_RATIO = 1.1  # of the zooms of both axes: sides are rounded to whole pixels, a large share of a small image


@dataclass(frozen=True)
class MapKind:
    """Base class of the kinds of maps.

    Args:
        layers: N of maps (N, H, W); None: maps are (H, W).
    """

    layers: int | None = None
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32,)
    is_interpolated: ClassVar[bool] = True  # bilinear; otherwise values are copied from the nearest pixel
    is_length: ClassVar[bool] = False  # whether values are in pixels, and grow with the image
    varies: ClassVar[bool] = False  # whether maps are (N, H, W) of any N, which differs between images

    def fill_value(self, ignore_index: int) -> float:
        """Return the value outside the image, for a dataset with this `ignore_index`."""
        raise NotImplementedError

    def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape of a map of `size` (H, W)."""
        return size if self.layers is None else (self.layers, *size)

    def accepts(self, shape: tuple[int, ...], size: tuple[int, int]) -> bool:
        """Return whether a map of an image of `size` (H, W) may have this shape."""
        return shape[1:] == size if self.varies and len(shape) == 3 else shape == self.shape(size)

    def make_empty(self, size: tuple[int, int], ignore_index: int) -> Tensor:
        """Return a map of `size` (H, W) for an image without one: the fill value everywhere."""
        return torch.full(self.shape(size), self.fill_value(ignore_index), dtype=self.dtypes[0])

    def make_random(self, size: tuple[int, int], num_classes: int, rng: torch.Generator) -> Tensor:
        """Return a random map of `size` (H, W), for tests and estimates."""
        return 10 * torch.randn(self.shape(size), generator=rng)

    def value_factor(self, zoom: tuple[float, float]) -> float:
        """Return the factor of the values where each pixel becomes `zoom` pixels, vertically and horizontally.

        Raises:
            UserError: they are lengths, and the zooms differ.
        """
        if not self.is_length:
            return 1.0
        if max(zoom) > _LARGEST_RATIO * min(zoom):
            raise UserError(
                f"A map of distances cannot be resized by {zoom[0]:.3f} vertically and {zoom[1]:.3f} horizontally: a "
                "distance would depend on its direction. Resize both axes alike."
            )
        return math.sqrt(zoom[0] * zoom[1])


@dataclass(frozen=True)
class LabelMap(MapKind):
    """Class ids, uint8, such as coarser classes or a second annotator's; outside the image, they are ignored."""

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.uint8,)
    is_interpolated: ClassVar[bool] = False

    def fill_value(self, ignore_index: int) -> float:
        """Return the ignored id."""
        return ignore_index

    def make_random(self, size: tuple[int, int], num_classes: int, rng: torch.Generator) -> Tensor:
        """Return random class ids."""
        return torch.randint(num_classes, self.shape(size), generator=rng, dtype=self.dtypes[0])


@dataclass(frozen=True)
class IdMap(MapKind):
    """Ids of objects, int32 or int64, never mixed; 0, no object, outside the image."""

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.int32, torch.int64)
    is_interpolated: ClassVar[bool] = False

    def fill_value(self, ignore_index: int) -> float:
        """Return 0."""
        return 0

    def make_random(self, size: tuple[int, int], num_classes: int, rng: torch.Generator) -> Tensor:
        """Return random ids."""
        return torch.randint(10, self.shape(size), generator=rng, dtype=self.dtypes[0])


@dataclass(frozen=True)
class ObjectMap(IdMap):
    """Objects of things, int32 (N, H, W), encoded as in `object_ids`; 0, no object, outside the image.

    An object lies in one layer. Objects that overlap need several, and an image without objects has none: N differs
    between images, and batches are padded with empty layers. The pixels of stuff are in the mask alone.

    Args:
        layers: None.
        things: ids of the classes that have objects, in order; the others are stuff.
    """

    things: tuple[int, ...] = ()
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.int32,)
    varies: ClassVar[bool] = True

    def shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Return the shape without objects: (0, H, W)."""
        return (0, *size)

    def make_random(self, size: tuple[int, int], num_classes: int, rng: torch.Generator) -> Tensor:
        """Return one layer of up to nine random objects, whose classes follow from their numbers."""
        numbers = torch.randint(10, (1, *size), generator=rng, dtype=torch.int32)
        return numbers + numbers % num_classes * encode_object(0, 1)


@dataclass(frozen=True)
class ValueMap(MapKind):
    """Values that do not depend on size and direction, float32, such as weights, heights or probabilities.

    Args:
        layers: N of maps (N, H, W); None: maps are (H, W).
        fill: value outside the image.
    """

    fill: float = 0.0

    def fill_value(self, ignore_index: int) -> float:
        """Return `fill`."""
        return self.fill


@dataclass(frozen=True)
class DistanceMap(ValueMap):
    """Distances in pixels, float32, signed or not: they grow with the image, and turning leaves them unchanged."""

    is_length: ClassVar[bool] = True


def get_map_kinds(data: object) -> Mapping[str, MapKind]:
    """Return the kinds by name of the maps that a dataset declares as `maps`; by default it has none."""
    return getattr(data, "maps", {})


def check_needed_maps(needed: Mapping[str, MapKind], kinds: Mapping[str, MapKind], loss: str, data: str) -> None:
    """Refuse a dataset that lacks a map which a loss reads.

    Args:
        needed: `Loss.needs_maps`.
        kinds: the dataset's.
        loss: its name, for the message.
        data: its name, for the message.

    Raises:
        UserError: a map is not declared, or is of another kind or number of layers.
    """
    for name, kind in needed.items():
        found = kinds.get(name)
        if type(found) is not type(kind) or found.layers != kind.layers:
            declared = f"declares {dict(kinds)}" if kinds else "declares no maps"
            raise UserError(
                f"{loss} reads the map {name}, {kind}, but {data} {declared}. Choose a dataset whose `maps` declares "
                "it and whose samples have it, or another loss."
            )


def check_maps(
    maps: Mapping[str, Any], kinds: Mapping[str, MapKind], size: tuple[int, int], where: str
) -> dict[str, Tensor]:
    """Return the declared maps of a sample.

    Args:
        maps: of the sample, by name.
        kinds: the declared ones.
        size: (H, W) of its image.
        where: the dataset and sample, for the message.

    Raises:
        UserError: a map is missing, or has another shape or type than declared.
    """
    for name, kind in kinds.items():
        value = maps.get(name)
        if not isinstance(value, Tensor) or value.dtype not in kind.dtypes or not kind.accepts(value.shape, size):
            form = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            dtypes = " or ".join(str(dtype) for dtype in kind.dtypes)
            raise UserError(
                f"{where}: the map {name} is {form}. As {type(kind).__name__}, it has to be a tensor of {dtypes} "
                f"{f'(N, {size[0]}, {size[1]})' if kind.varies else kind.shape(size)}."
            )
    return {name: maps[name] for name in kinds}


def make_random_maps(
    kinds: Mapping[str, MapKind], count: int, size: tuple[int, int], num_classes: int, rng: torch.Generator
) -> dict[str, Tensor]:
    """Return random maps (B, H, W) or (B, N, H, W) of `count` samples, by name."""
    maps = {}
    for name, kind in kinds.items():
        maps[name] = torch.stack([kind.make_random(size, num_classes, rng) for _ in range(count)])
    return maps


def resize_map(values: Tensor, kind: MapKind, size: tuple[int, int]) -> Tensor:
    """Return maps (..., h, w) at `size` (H, W), sampled at the centres of the pixels.

    Raises:
        UserError: they hold distances, and the sides of the image change by different factors.
    """
    height, width = values.shape[-2:]
    factor = kind.value_factor((size[0] / height, size[1] / width))
    if not kind.is_interpolated:
        return resize_nearest(values, size)
    resized = F.interpolate(values.reshape(-1, 1, height, width), size, mode="bilinear")
    return factor * resized.view(*values.shape[:-2], *size)


def resize_nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Return values (..., h, w) of any type at `size` (H, W), equal to `F.interpolate(..., mode="nearest-exact")`."""
    if values.shape[-2:] == size:
        return values
    rows, columns = (
        F.interpolate(
            torch.arange(old, dtype=torch.float32, device=values.device)[None, None], new, mode="nearest-exact"
        )
        .flatten()
        .long()
        for old, new in zip(values.shape[-2:], size, strict=True)
    )
    return values[..., rows[:, None], columns]
