"""Random images and masks in the shapes of a recipe's training data."""

import math

import torch
from torch import Tensor

from dinoseg.core.sample_maps import make_random_maps
from dinoseg.core.shapes import Batch
from dinoseg.extensions.auto.parts import TrainingParts

_PIECES = 4  # of a mask along each side: a typical number of classes per image


def random_batch(parts: TrainingParts, samples: int) -> Batch:
    """Return a batch of noise; masks consist of rectangles with random classes, maps are noise, clips have neither."""
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (samples, *parts.shape), dtype=torch.uint8, generator=rng)
    names = [f"random {number}" for number in range(samples)]
    masks = _masks(parts, samples, rng) if parts.has_masks else image.new_empty(samples, 0)
    maps = make_random_maps(parts.loss().needs_maps, samples, parts.crop, parts.num_classes, rng)
    return Batch(image, masks, names, maps)


def _masks(parts: TrainingParts, samples: int, rng: torch.Generator) -> Tensor:
    """Return masks (B, H, W) uint8, or with layers (B, K, H, W)."""
    height, width = parts.crop
    shape = (samples, parts.num_classes) if parts.has_layers else (samples,)
    values = 2 if parts.has_layers else parts.num_classes
    ids = torch.randint(0, values, (*shape, _PIECES, _PIECES), dtype=torch.uint8, generator=rng)
    down, along = (math.ceil(length / _PIECES) for length in (height, width))
    return ids.repeat_interleave(down, -2).repeat_interleave(along, -1)[..., :height, :width].contiguous()
