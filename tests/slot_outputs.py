"""Outputs of a slot head, and the losses that read them."""

from dataclasses import replace
from functools import partial

import torch

from dinoseg.core.geometry import upsample
from dinoseg.core.shapes import Batch, Prediction
from dinoseg.extensions.slots.contract import SlotOutputs
from dinoseg.extensions.slots.losses.feature_reconstruction import FeatureReconstruction
from dinoseg.extensions.slots.losses.temporal_similarity import TemporalSimilarity


def outputs_of(steps=(0,), clips=2, length=4, channels=3, grid=(2, 3), dtype=torch.float64, **changes):
    frames, cells = length - max(steps), grid[0] * grid[1]
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    masks = torch.full((clips, frames, 2, *grid), 0.5)
    outputs = SlotOutputs(
        features=draw(clips, length, channels, *grid).to(dtype).requires_grad_(),
        reconstructions=[draw(clips, frames, channels, *grid).to(dtype).requires_grad_() for _ in steps],
        alphas=[masks] * len(steps),
        attention=masks,
        slots=torch.zeros(clips, frames, 2, 7),
        steps=list(steps),
        similarity=draw(clips, frames, cells, *grid).mul_(4).to(dtype).requires_grad_(),
    )
    return replace(outputs, **changes)


def run(outputs, loss):
    batch = Batch(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((2, 8, 8), 255, dtype=torch.uint8), ["a", "b"])
    return loss(Prediction(outputs, (8, 8), (1.0, 1.0), upsample), batch)


reconstruct = partial(run, loss=FeatureReconstruction())


compare = partial(run, loss=TemporalSimilarity())
