"""Random images and masks in the shapes of a recipe's training data."""

import math

import torch
from omegaconf import DictConfig
from torch import Tensor

from dinoseg.config.nodes import instantiate
from dinoseg.core.shapes import Batch, ClipBatch
from dinoseg.experiment import build
from dinoseg.utils.errors import UserError

_PIECES = 4  # of a mask along each side: a typical number of classes per image


def image_shape(cfg: DictConfig) -> tuple[int, ...]:
    """Return the shape of a training sample's pixels, (3, H, W) or (T, 3, H, W).

    Raises:
        UserError: the crop is invalid, the data has no clips, or clips have no fixed length.
    """
    if not build.on_clips(cfg):
        instantiate(cfg.data.augment)
        return (3, *cfg.resolution.crop)
    if cfg.data.clips is None:
        raise UserError(f"data={cfg.choices.data} has no clips. Choose data=davis2017, movi or videos.")
    instantiate(cfg.data.view)
    length = cfg.data.clips.cut.length
    if not isinstance(length, int) or length < 1:
        raise UserError(
            f"data.clips.cut.length={length}: how many frames a clip has is needed here. Give a number of at least 1."
        )
    return (length, 3, *cfg.resolution.crop)


def drawn_batch(cfg: DictConfig, samples: int, seed: int = 0) -> Batch | ClipBatch:
    """Return a batch of noise; its masks consist of rectangles with random classes."""
    draw = torch.Generator().manual_seed(seed)
    shape = image_shape(cfg)
    image = torch.randint(0, 256, (samples, *shape), dtype=torch.uint8, generator=draw)
    names = [f"drawn {number}" for number in range(samples)]
    return ClipBatch(image, names) if len(shape) == 4 else Batch(image, _masks(cfg, samples, draw), names)


def _masks(cfg: DictConfig, samples: int, draw: torch.Generator) -> Tensor:
    """Return masks (B, H, W) uint8."""
    height, width = cfg.resolution.crop
    ids = torch.randint(0, len(cfg.data.classes), (samples, _PIECES, _PIECES), dtype=torch.uint8, generator=draw)
    down, along = (math.ceil(length / _PIECES) for length in (height, width))
    return ids.repeat_interleave(down, 1).repeat_interleave(along, 2)[:, :height, :width].contiguous()
