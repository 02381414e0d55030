"""Random crop of a clip, shared by all its frames, and batches of such clips."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import cv2
import numpy as np
import torch
from torch import Tensor

from dinoseg.core.shapes import StackedSamples
from dinoseg.data.loader import CLIP, VIEW, make_rng, sample_batches
from dinoseg.extensions.clips.cut import Clips
from dinoseg.extensions.clips.square import resize_bicubic
from dinoseg.utils.errors import UserError
from dinoseg.utils.ranges import Count, Share, check_annotations


class ClipView:
    """Resize frames to cover `crop`, preserving the aspect ratio, and crop every frame at the same position.

    Args:
        crop: (H, W) of the result, pixels.
        scale: minimum and maximum factor on the smallest covering size, sampled uniformly; 1 or more.
        flip: probability of a horizontal flip, for all frames of a clip or none.
        resample: `area` (of the covered pixels; bilinear when enlarged), or `bicubic` without antialiasing, clamped to
            0..255, with sizes rounded down, as in SlotContrast (martius-lab/slotcontrast, data/transforms.py).

    Raises:
        UserError: a value is out of range.
    """

    @check_annotations
    def __init__(
        self,
        crop: tuple[Count, Count],
        *,
        scale: tuple[float, float] = (1.0, 1.0),
        flip: Share = 0.0,
        resample: Literal["area", "bicubic"] = "area",
    ) -> None:
        if not 1 <= scale[0] <= scale[1]:
            raise UserError(f"scale={list(scale)}: give [least, largest] with 1 <= least <= largest.")
        self.resample = resample
        self.crop, self.scale, self.flip = (int(crop[0]), int(crop[1])), (float(scale[0]), float(scale[1])), flip

    def __call__(self, frames: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """Return (T, *crop, 3) of frames (T, H, W, 3) uint8; without `rng` the centre crop at minimum scale, unflipped.

        Each call uses a fixed number of random numbers, so changing one setting does not change the others' values.
        """
        zoom, down, right, mirror = np.array([0, 0.5, 0.5, 1]) if rng is None else rng.random(4)
        height, width = frames.shape[1:3]
        factor = max(self.crop[0] / height, self.crop[1] / width)
        factor *= self.scale[0] + zoom * (self.scale[1] - self.scale[0])
        rounded = round if self.resample == "area" else int
        size = (max(self.crop[0], rounded(height * factor)), max(self.crop[1], rounded(width * factor)))
        spare = size[0] - self.crop[0], size[1] - self.crop[1]
        if rng is None:
            top, left = round(spare[0] / 2), round(spare[1] / 2)
        else:
            # each position is equally likely, as in torchvision's RandomCrop
            top, left = int(down * (spare[0] + 1)), int(right * (spare[1] + 1))
        seen = np.empty((len(frames), *self.crop, 3), dtype=np.uint8)
        for frame, target in zip(frames, seen, strict=True):
            resized = frame if size == (height, width) else self._resize(frame, size)
            target[:] = resized[top : top + self.crop[0], left : left + self.crop[1]]
        return np.ascontiguousarray(seen[:, :, ::-1]) if mirror < self.flip else seen

    def _resize(self, frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Return a frame (H, W, 3) uint8 at `size` (H, W)."""
        if self.resample == "area":
            how = cv2.INTER_AREA if size[0] < frame.shape[0] or size[1] < frame.shape[1] else cv2.INTER_LINEAR
            return cv2.resize(frame, size[::-1], interpolation=how)
        return resize_bicubic(frame, size)


@dataclass
class ClipBatch(StackedSamples):
    """Clips of one length and size, stacked."""

    image: Tensor  # (B, T, 3, H, W) uint8
    names: list[str]

    @property
    def count(self) -> int:
        """Return the number of images, that is, of all frames."""
        return self.image.shape[:2].numel()

    @classmethod
    def stack(cls, clips: Sequence[tuple[Tensor, str]]) -> Self:
        """Stack the frames (T, 3, H, W) of clips, each with its name."""
        return cls(torch.stack([frames for frames, _ in clips]), [name for _, name in clips])


def clip_batches(
    clips: Clips,
    view: ClipView,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[ClipBatch]:
    """Yield batches of clips as `sample_batches` does: shuffled over all videos; no masks are read."""
    read = partial(_read_clip, clips, view, seed)
    order = {"batch_size": batch_size, "seed": seed, "start": start, "rank": rank, "world_size": world_size}
    return sample_batches(read, ClipBatch.stack, len(clips), workers=workers, **order)


def _read_clip(clips: Clips, view: ClipView, seed: int, epoch: int, index: int) -> tuple[Tensor, str]:
    frames, name = clips.frames(index, make_rng(seed, epoch, index, CLIP))
    seen = view(frames, make_rng(seed, epoch, index, VIEW))
    return torch.from_numpy(seen).permute(0, 3, 1, 2), name  # (T, 3, H, W)
