"""Conformance of backbones."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from dinoseg.core.contracts import Backbone
from dinoseg.core.geometry import pad_to_multiple, widths
from dinoseg.testing.modules import (
    IMAGE_SIZE,
    MODULE_RULES,
    ModuleCase,
    are_close,
    check_class,
    check_unchanged,
    fixed_seed,
    random_images,
    require,
)

SIZES = ((64, 96), (33, 75), (95, 64), (1, 1))  # (H, W)


def check_backbone(make_backbone: Callable[..., Backbone]) -> None:
    """Check that a backbone keeps the contract of `dinoseg.core.contracts.Backbone`.

    Args:
        make_backbone: the class, or a `functools.partial` of it with small sizes and random weights. It is called with
            `layers=[0, -1]`: the first and the last block.

    Raises:
        AssertionError: it breaks a rule; the message names the rule, the result and the remedy.

    Examples:
        >>> from functools import partial
        >>> from dinoseg.models.backbones.rgb import RgbBackbone
        >>> from dinoseg.testing import check_backbone
        >>> check_backbone(partial(RgbBackbone, patch_size=8))
    """

    def make() -> Backbone:
        return make_backbone(layers=[0, -1])

    with fixed_seed():
        backbone = make().eval()
        check_class(backbone, Backbone)
        check_members(backbone)
        check_maps(backbone)
        check_unchanged(type(backbone).__name__, lambda images: backbone(images[0]), [random_images(1)])
        case = ModuleCase(make, run=_run, run_training=_run, unused=tuple(backbone.unused))
        for rule in MODULE_RULES:
            rule(case)
        check_normalisation(backbone)
        check_padding(backbone)
        check_frozen_split(backbone)


def _run(backbone: Any, images: Tensor) -> list[Tensor]:
    return backbone(images)


def check_members(backbone: Backbone) -> None:
    """Check the members that heads, adapters and checkpoints read."""
    name = type(backbone).__name__
    missing = [key for key in ("dim", "patch_size", "num_layers", "depth", "mean", "std") if not _has(backbone, key)]
    require(
        not missing,
        f"{name}: a backbone must set its members in `__init__`, but {', '.join(missing)} is missing; set it "
        "(register_colours sets mean and std).",
    )
    expected = [0, backbone.depth - 1]
    require(
        list(backbone.layers) == expected and backbone.num_layers == 2,
        f"{name}: with layers=[0, -1] and depth={backbone.depth}, `layers` must be {expected} and `num_layers` 2, but "
        f"they are {list(backbone.layers)} and {backbone.num_layers}; use "
        "dinoseg.models.backbones.layers.resolve_layers.",
    )
    require(
        backbone.is_pyramid == (not isinstance(backbone.dim, int)),
        f"{name}: `dim` must be a list for a pyramid and a number otherwise, but is_pyramid={backbone.is_pyramid} and "
        f"dim={backbone.dim}; correct one of them.",
    )


def _has(backbone: Backbone, name: str) -> bool:
    return getattr(backbone, name, None) is not None


def check_maps(backbone: Backbone) -> None:
    """Check the number, width, grid and dtype of the maps at odd image sizes."""
    name = type(backbone).__name__
    for size in SIZES:
        maps = backbone(random_images(1, size))
        rows, columns = (-(-side // backbone.patch_size) for side in size)
        coarsest = min((tuple(part.shape[2:]) for part in maps), default=None)
        require(
            [part.shape[1] for part in maps] == widths(backbone.dim, 2) and coarsest == (rows, columns),
            f"{name}: an image of {size} must give 2 maps of widths {widths(backbone.dim, 2)}, the coarsest on a grid "
            f"of ({rows}, {columns}), but it gave {[tuple(part.shape) for part in maps]}; pad images with self.pixels, "
            "and drop tokens that are no patches.",
        )
        require(
            backbone.is_pyramid or len({part.shape[2:] for part in maps}) == 1,
            f"{name}: all maps must have one grid unless `is_pyramid` is set, but their shapes are "
            f"{[tuple(part.shape) for part in maps]}; set is_pyramid = True.",
        )
        require(
            all(part.dtype == torch.float32 and bool(part.isfinite().all()) for part in maps),
            f"{name}: maps must be finite and float32, but for an image of {size} they are not; check divisions and "
            "conversions.",
        )


def check_normalisation(backbone: Backbone) -> None:
    """Check that images are normalised inside, by the buffers `mean` and `std`."""
    images = random_images(1, (4 * backbone.patch_size, 5 * backbone.patch_size))
    plain = deepcopy(backbone)
    plain.mean.zero_()
    plain.std.fill_(1)
    require(
        are_close(plain((images - backbone.mean) / backbone.std), backbone(images)),
        f"{type(backbone).__name__}: images in 0..1 must be normalised by the buffers `mean` and `std`, but they are "
        "not; start `forward` with self.pixels(images).",
    )


def check_padding(backbone: Backbone) -> None:
    """Check that images are padded with the mean colour, at the bottom and on the right."""
    images = random_images(1)
    height, width = IMAGE_SIZE
    padded = backbone.mean.expand_as(pad_to_multiple(images, backbone.patch_size)).clone()
    padded[..., :height, :width] = images
    require(
        are_close(backbone(images), backbone(padded)),
        f"{type(backbone).__name__}: an image must give the maps of the same image padded with `mean` at the bottom "
        "and on the right, but it gives others; start `forward` with self.pixels(images).",
    )


def check_frozen_split(backbone: Backbone) -> None:
    """Check that features computed in advance give the same maps."""
    frozen = deepcopy(backbone).requires_grad_(False)
    images = random_images(2)
    maps = frozen.forward_trainable(frozen.forward_frozen(images), IMAGE_SIZE)
    require(
        are_close(maps, frozen(images)),
        f"{type(backbone).__name__}: forward_trainable(forward_frozen(images)) must give the maps of forward(images), "
        "but they differ; correct these two methods, or inherit both.",
    )
    if backbone.has_tokens:
        tokens = frozen.trainable_tokens(frozen.forward_frozen(images), frozen.block_kwargs(IMAGE_SIZE))
        patches = [part[:, -maps[0][0, 0].numel() :].mT.unflatten(2, maps[0].shape[2:]) for part in tokens]
        require(
            are_close(maps, patches),
            f"{type(backbone).__name__}: the last h * w tokens of trainable_tokens(forward_frozen(images)) must be "
            "those of the maps, but they differ; put class and register tokens first, and apply the norm of the maps.",
        )
